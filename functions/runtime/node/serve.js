// Serves a handler module over HTTP on 127.0.0.1:5000, behind the watchdog. The module named by the
// first argument exports a function (body, query) that returns, or promises, a Buffer, a string or
// a value for JSON. It is loaded, and so initialised, before the socket listens. Where there is no
// such module this is a base, from whose snapshot functions start: the module of such a function is
// loaded when /_/load asks for it, or by the first call. Asked by POST, it takes environment variables
// of the function's own over first.
'use strict';

const fs = require('fs');
const http = require('http');
const net = require('net');
const path = require('path');
const v8 = require('v8');
const vm = require('vm');

const file = path.resolve(process.argv[2]);
let handle = fs.existsSync(file) ? require(file) : null;

function load(variables = '') {
  if (variables.length > 0) adopt(JSON.parse(variables).environment);
  handle = require(file);
  collect();
}

// A variable without a value is removed.
function adopt(variables) {
  for (const [name, value] of Object.entries(variables)) {
    if (value === null) delete process.env[name];
    else process.env[name] = value;
  }
}

// A collected heap is smaller to keep and to copy.
function collect() {
  v8.setFlagsFromString('--expose-gc');
  vm.runInNewContext('gc')();
}

const server = http.createServer((request, response) => {
  const parts = [];
  request.on('data', (part) => parts.push(part));
  request.on('end', async () => {
    let status = 200;
    let kind = 'application/json';
    let result;
    try {
      const url = new URL(request.url, 'http://localhost');
      const body = Buffer.concat(parts);
      // As it was sent, which is what the provider keeps callers from.
      const asked = request.url.split('?')[0] === '/_/load';
      if (handle === null) load(asked ? body : '');
      result = asked ? 'loaded\n' : await handle(body, Object.fromEntries(url.searchParams));
    } catch (error) {
      console.error(String(error));
      status = 500;
      result = { error: String(error) };
    }
    if (Buffer.isBuffer(result)) {
      kind = 'application/octet-stream';
    } else if (typeof result === 'string') {
      kind = 'text/plain; charset=utf-8';
      result = Buffer.from(result);
    } else {
      result = Buffer.from(JSON.stringify(result) + '\n');
    }
    response.writeHead(status, { 'Content-Type': kind, 'Content-Length': result.length });
    response.end(request.method === 'HEAD' ? undefined : result);
  });
});

// Runs the way of a call a few times for a function that does nothing: what is compiled and
// allocated by that is then there for every instance that comes from one snapshot.
async function rehearse() {
  const real = handle;
  handle = (body, query) => ({ rehearsed: query, length: body.length });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  for (let round = 0; round < 20; round++) {
    await new Promise((done) => {
      const caller = net.connect(server.address().port, '127.0.0.1', () => {
        caller.write('POST /?a=b HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n');
        caller.end('Connection: close\r\n\r\nhi');
      });
      caller.resume().on('close', done);
    });
  }
  await new Promise((done) => server.close(done));
  handle = real;
}

process.on('SIGTERM', () => {
  server.close(() => process.exit(0));
  server.closeIdleConnections();
});

rehearse().then(() => {
  collect();
  server.listen(Number(process.env.PORT || 5000), process.env.HOST || '127.0.0.1', 128);
});

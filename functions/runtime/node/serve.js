// Serves a handler module over HTTP on 127.0.0.1:5000, behind the watchdog. The module named by the
// first argument exports a function (body, query) that returns, or promises, a Buffer, a string or
// a value for JSON. It is loaded, and so initialised, before the socket listens.
'use strict';

const http = require('http');
const path = require('path');

const handle = require(path.resolve(process.argv[2]));

const server = http.createServer((request, response) => {
  const parts = [];
  request.on('data', (part) => parts.push(part));
  request.on('end', async () => {
    let status = 200;
    let kind = 'application/json';
    let result;
    try {
      const query = Object.fromEntries(new URL(request.url, 'http://localhost').searchParams);
      result = await handle(Buffer.concat(parts), query);
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

const port = Number(process.env.PORT || 5000);
const host = process.env.HOST || '127.0.0.1';
process.on('SIGTERM', () => {
  server.close(() => process.exit(0));
  server.closeIdleConnections();
});
server.listen(port, host, 128);

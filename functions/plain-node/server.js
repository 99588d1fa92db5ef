// The hello function on Node's own HTTP server, without a watchdog: it listens on port 8080.
'use strict';

const crypto = require('crypto');
const http = require('http');

const heap = crypto.randomBytes(1 << 20);
const initId = crypto.createHash('sha256').update(heap).digest('hex').slice(0, 16);
let counter = 0;

http
  .createServer((request, response) => {
    request.resume().on('end', () => {
      counter += 1;
      response.setHeader('Content-Type', 'application/json');
      response.end(JSON.stringify({ message: 'Hello!', counter, init_id: initId }) + '\n');
    });
  })
  .listen(Number(process.env.PORT || 8080), '0.0.0.0');

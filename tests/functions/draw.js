// Answers every call with what a program draws at random.
'use strict';

const crypto = require('crypto');
const http = require('http');
const os = require('os');

function draw() {
  return {
    random: Math.random(),
    bytes: crypto.randomBytes(8).toString('hex'),
    uuid: crypto.randomUUID(),
    int: crypto.randomInt(2 ** 47),
    key: crypto.createECDH('prime256v1').generateKeys('hex'),
  };
}

// A generator that was never used has no state to share.
draw();
http
  .createServer((request, response) => {
    response.setHeader('Content-Type', 'application/json');
    response.end(JSON.stringify({ draws: draw(), host: os.hostname() }));
  })
  .listen(8080, '0.0.0.0');

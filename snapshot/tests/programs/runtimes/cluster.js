// Node's cluster: a primary that counts, and two workers that it hands connections to through their
// channels. A worker answers "COUNT TICKS ok" on port 8080, the count by asking the primary.
'use strict';
const cluster = require('cluster');
const http = require('http');

if (cluster.isPrimary) {
  let count = 0;
  for (let n = 0; n < 2; n++) {
    const worker = cluster.fork();
    worker.on('message', () => worker.send(++count));
  }
} else {
  let ticks = 0;
  const waiting = [];
  setInterval(() => ticks++, 10);
  process.on('message', (count) => waiting.shift().end(`${count} ${ticks} ok\n`));
  http.createServer((_, answer) => {
    answer.setHeader('Connection', 'close');
    waiting.push(answer);
    process.send('count');
  }).listen(8080, '127.0.0.1');
}

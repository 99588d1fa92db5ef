// Node's worker threads: one that answers through a MessageChannel, one that waits in Atomics.wait,
// timers, promises and the thread pool of libuv. Each line on standard input asks all of them; the
// answer is "COUNT TICKS ok", or what is wrong.
'use strict';
const { Worker, MessageChannel, isMainThread, workerData } = require('worker_threads');
const { pbkdf2 } = require('crypto');
const { promisify } = require('util');
const readline = require('readline');
const fs = require('fs/promises');

if (!isMainThread && workerData.port) {
  let count = 0;
  setInterval(() => {}, 5);
  workerData.port.on('message', () => workerData.port.postMessage(++count));
} else if (!isMainThread) {
  const cells = new Int32Array(workerData.shared);
  for (let seen = 0; ; seen++) {
    Atomics.wait(cells, 0, seen);
    Atomics.add(cells, 1, 1);
    Atomics.notify(cells, 1);
  }
} else {
  const channel = new MessageChannel();
  const workers = [new Worker(__filename, { workerData: { port: channel.port1 }, transferList: [channel.port1] })];
  const shared = new SharedArrayBuffer(8);
  const cells = new Int32Array(shared);
  workers.push(new Worker(__filename, { workerData: { shared } }));
  const heap = Array.from({ length: 100000 }, (_, n) => ({ n }));
  let count = 0;
  let ticks = 0;
  setInterval(() => ticks++, 10);
  const far = setTimeout(() => process.exit(1), 3600 * 1000);
  const digest = () => promisify(pbkdf2)('secret', 'salt', 100, 16, 'sha256');
  let expected;
  const check = async () => {
    const answer = new Promise((done) => channel.port2.once('message', done));
    channel.port2.postMessage('add');
    if (await answer !== count) return 'the channel';
    Atomics.add(cells, 0, 1);
    Atomics.notify(cells, 0);
    while (Atomics.load(cells, 1) !== count) Atomics.wait(cells, 1, count - 1, 100);
    const found = (await digest()).toString('hex');
    expected = expected ?? found;
    if (found !== expected) return 'the thread pool';
    if (!(await fs.readFile(__filename, 'utf8')).startsWith('// Node')) return 'the file';
    if (heap.some((entry, n) => entry.n !== n)) return 'the heap';
    return far.hasRef() ? 'ok' : 'the timer';
  };
  readline.createInterface({ input: process.stdin }).on('line', async () => {
    count++;
    const verdict = await check();
    process.stdout.write(`${count} ${ticks} ${verdict}\n`);
  });
}

// Node's event loop: a server and a client that are connected by a unix socket, a file that is
// watched, a file that is written as a stream, a command with its pipes, promises that wait for
// timers. Each line on standard input asks all of them; the answer is "COUNT TICKS ok", or what is
// wrong.
'use strict';
const { spawn, exec } = require('child_process');
const { once } = require('events');
const { promisify } = require('util');
const fs = require('fs');
const net = require('net');
const readline = require('readline');

const place = fs.mkdtempSync('/dev/shm/node');
const lines = (stream) => readline.createInterface({ input: stream })[Symbol.asyncIterator]();
let count = 0;
let ticks = 0;
let changes = 0;

async function ticking() {
  for (;;) {
    await new Promise((done) => setTimeout(done, 10));
    ticks++;
  }
}

async function main() {
  const server = net.createServer((peer) => peer.pipe(peer)).listen(`${place}/socket`);
  await once(server, 'listening');
  const client = net.connect(`${place}/socket`);
  const echoed = lines(client);
  const command = spawn('/bin/cat', { stdio: ['pipe', 'pipe', 'ignore'] });
  const repeated = lines(command.stdout);
  fs.writeFileSync(`${place}/watched`, '');
  fs.watch(`${place}/watched`, () => changes++);
  const log = fs.createWriteStream(`${place}/log`);
  ticking();
  const check = async () => {
    client.write(`${count}\n`);
    if ((await echoed.next()).value !== String(count)) return 'the connection';
    const late = net.connect(`${place}/socket`);
    late.end('late\n');
    if ((await lines(late).next()).value !== 'late') return 'a connection made now';
    command.stdin.write(`${count}\n`);
    if ((await repeated.next()).value !== String(count)) return 'the command';
    if ((await promisify(exec)('echo said')).stdout !== 'said\n') return 'a command that ends';
    const before = changes;
    fs.appendFileSync(`${place}/watched`, 'x');
    for (let turn = 0; changes === before; turn++) {
      if (turn === 100) return 'the watch';
      await new Promise((done) => setTimeout(done, 10));
    }
    await promisify(log.write.bind(log))(`${count}\n`);
    const written = fs.readFileSync(`${place}/log`, 'utf8').trim().split('\n');
    return written.length === count && written.at(-1) === String(count) ? 'ok' : 'the stream';
  };
  readline.createInterface({ input: process.stdin }).on('line', async () => {
    count++;
    const verdict = await check();
    process.stdout.write(`${count} ${ticks} ${verdict}\n`);
  });
}

main();

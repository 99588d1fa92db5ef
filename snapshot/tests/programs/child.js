// Node's child_process: a child by fork with its channel, and a command that ends. Each line on
// standard input asks both; the answer is "COUNT ok", or what is wrong.
'use strict';
const { fork, execFileSync } = require('child_process');
const readline = require('readline');

if (process.argv[2] === 'child') {
  let count = 0;
  process.on('message', () => process.send(++count));
} else {
  const child = fork(__filename, ['child']);
  readline.createInterface({ input: process.stdin }).on('line', () => {
    child.once('message', (count) => {
      const said = execFileSync('/bin/echo', ['said']).toString().trim();
      process.stdout.write(`${count} ${said === 'said' ? 'ok' : said}\n`);
    });
    child.send('add');
  });
}

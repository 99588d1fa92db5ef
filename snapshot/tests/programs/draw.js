// Answers each line with what a program draws at random.
'use strict';

const crypto = require('crypto');

function draw() {
  return {
    random: Math.random(),
    bytes: crypto.randomBytes(8).toString('hex'),
    filled: Buffer.from(crypto.webcrypto.getRandomValues(new Uint8Array(8))).toString('hex'),
    uuid: crypto.randomUUID(),
    web_uuid: crypto.webcrypto.randomUUID(),
    int: crypto.randomInt(2 ** 47),
    key: crypto.createECDH('prime256v1').generateKeys('hex'),
  };
}

draw();
process.stdin.on('data', () => process.stdout.write(JSON.stringify(draw()) + '\n'));

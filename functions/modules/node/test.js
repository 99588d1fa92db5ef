// Run by: node --test functions/modules/node/test.js
'use strict';

const assert = require('assert');
const { execFileSync, spawnSync } = require('child_process');
const fs = require('fs');
const os = require('os');
const path = require('path');
const { after, test } = require('node:test');

const place = fs.mkdtempSync(path.join(os.tmpdir(), 'trenv-generation-'));
after(() => fs.rmSync(place, { recursive: true }));
for (const name of ['index.js', 'package.json']) {
  fs.copyFileSync(path.join(__dirname, name), path.join(place, name));
}
execFileSync('cc', [
  '-O2', '-Wall', '-Wextra', '-Wno-unused-parameter', '-Werror', '-shared', '-fPIC',
  '-fvisibility=hidden', '-o', path.join(place, 'page.node'), path.join(__dirname, 'page.c'),
]);
const page = path.join(place, 'page');

/** Runs a script in a Node of its own, where change(n) makes the page another one. */
function run(script, environment = {}) {
  fs.writeFileSync(page, Buffer.concat([Buffer.from('TRENVGEN'), Buffer.alloc(4088)]));
  const whole =
    "const change = (n) => { const file = fs.openSync(process.env.TRENV_GENERATION, 'r+');" +
    'fs.writeSync(file, Buffer.alloc(16, n), 0, 16, 16); fs.closeSync(file); };' + script;
  const env = { ...process.env, TRENV_GENERATION: page, ...environment };
  const done = spawnSync(process.execPath, ['--require', place, '-e', whole], { env, encoding: 'utf8' });
  assert.strictEqual(done.status, 0, done.stderr);
  return done;
}

/** What the script prints as JSON. */
const answer = (script) => JSON.parse(run(`console.log(JSON.stringify((() => {${script}})()))`).stdout);

test('Math.random throws its numbers away when the page changes', () => {
  // The source of the numbers is made to repeat itself, so that what is drawn anew is seen.
  const draws = answer(`
    let fills = 0;
    crypto.randomFillSync = (array) => { fills += 1; return array.fill(0x10000000 * fills); };
    const seen = [Math.random(), Math.random(), fills];
    change(1);
    return [...seen, Math.random(), Math.random(), fills];
  `);
  const [first, second, filled, third, fourth, filledThen] = draws;
  assert.deepStrictEqual([first, third, filled, filledThen], [second, fourth, 1, 2]);
  assert.notStrictEqual(first, third);
});

test('Math.random is even, below one, and of many values', () => {
  const [mean, least, most, different] = answer(`
    let sum = 0, least = 1, most = 0;
    const all = new Set();
    for (let i = 0; i < 1e5; i++) {
      const x = Math.random();
      sum += x; least = Math.min(least, x); most = Math.max(most, x); all.add(x);
    }
    return [sum / 1e5, least, most, all.size];
  `);
  assert.ok(mean > 0.49 && mean < 0.51 && least >= 0 && most < 1 && different === 1e5);
});

test('randomInt keeps its meaning when the page changes', () => {
  // That clones get other numbers is seen with real clones, by snapshot/tests/generation.rs.
  const seen = answer(`
    const draw = () => Array.from({ length: 2000 }, () => crypto.randomInt(5, 9));
    const before = draw();
    change(2);
    const kinds = [...new Set([...before, ...draw()])].sort();
    let refused = false;
    try { crypto.randomInt(3, 1); } catch { refused = true; }
    return [kinds, refused, crypto.randomInt(1)];
  `);
  assert.deepStrictEqual(seen, [[5, 6, 7, 8], true, 0]);
  const called = run('crypto.randomInt(4, (error, n) => console.log(error ?? null, n < 4))');
  assert.strictEqual(called.stdout, 'null true\n');
});

test('OpenSSL and UUIDs work, by every name', () => {
  const draws = answer(`
    const { randomUUID, webcrypto } = crypto;
    const keys = crypto.generateKeyPairSync('ec', { namedCurve: 'prime256v1' });
    const pem = (key) => key.export({ type: 'spki', format: 'pem' }).length > 100;
    return [randomUUID(), crypto.randomUUID({}), webcrypto.randomUUID(),
      crypto.randomBytes(16).toString('hex'), crypto.randomBytes(100000).length, pem(keys.publicKey)];
  `);
  assert.strictEqual(new Set(draws).size, draws.length);
  for (const uuid of draws.slice(0, 3)) {
    assert.match(uuid, /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
  }
});

test('a program can watch the page, also in a worker', () => {
  const script = `
    const { watch, active } = require(${JSON.stringify(place)});
    const changed = watch();
    const seen = [active, changed()];
    change(3);
    seen.push(changed(), changed());
    if (isMainThread) {
      new Worker(__filename, { eval: false }).on('message', (theirs) => console.log(JSON.stringify([seen, theirs])));
    } else {
      parentPort.postMessage(seen);
    }`;
  const file = path.join(place, 'watch.js');
  fs.writeFileSync(file,
    "const { Worker, isMainThread, parentPort } = require('worker_threads'); const fs = require('fs');" +
    'const change = (n) => { const file = fs.openSync(process.env.TRENV_GENERATION, "r+");' +
    'fs.writeSync(file, Buffer.alloc(16, isMainThread ? 3 : 4), 0, 16, 16); fs.closeSync(file); };' + script);
  const { stdout } = run(`require(${JSON.stringify(file)})`);
  assert.deepStrictEqual(JSON.parse(stdout), Array(2).fill([true, false, true, false]));
});

test('modules of the newer kind get the functions too', () => {
  const file = path.join(place, 'own.mjs');
  fs.writeFileSync(file,
    "import crypto, { randomUUID } from 'crypto'; console.log(randomUUID === crypto.randomUUID);");
  const env = { ...process.env, TRENV_GENERATION: page };
  const output = execFileSync(process.execPath, ['--require', place, file], { env, encoding: 'utf8' });
  assert.strictEqual(output, 'true\n');
});

test('without a page nothing happens', () => {
  const script = 'console.log(String(Math.random).includes("native"))';
  assert.strictEqual(run(script, { TRENV_GENERATION: '' }).stdout, 'true\n');
  const done = run(script, { TRENV_GENERATION: '/dev/null' });
  assert.strictEqual(done.stdout, 'true\n');
  assert.match(done.stderr, /random state is shared/);
});

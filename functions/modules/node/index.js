// Draws random state anew in each instance that comes from a snapshot.
//
// An instance of a function continues where its snapshot was taken, and so do all others of that
// snapshot: their generators would go on with equal numbers. The sandbox has a page of 16 random
// bytes that differ from instance to instance ($TRENV_GENERATION). Loaded by
// `node --require trenv-generation`, before everything else, this module sees to it that
//
// - Math.random, which V8 seeds once and for all, draws from numbers that are thrown away as soon as
//   the page has changed;
// - OpenSSL, and with it everything of `crypto` and every TLS connection, asks the kernel each time;
// - crypto.randomInt and crypto.randomUUID use none of the bytes that Node drew for them in advance.
//
// What cannot be drawn anew is shared: V8's hash seed above all, and the Math.random of contexts that
// `vm` makes. For a generator of your own:
//
//     const changed = require('trenv-generation').watch();
//     if (changed()) seed = crypto.randomBytes(16);
//
// It does nothing outside of trenv.
'use strict';

const crypto = require('crypto');
const fs = require('fs');
const { syncBuiltinESMExports } = require('module');
const path = require('path');

const file = process.env.TRENV_GENERATION;

/** The mapped page, or undefined where there is none to look at. */
function open() {
  if (!file) {
    return undefined;
  }
  const built = ['page.node', 'build/Release/page.node'].map((name) => path.join(__dirname, name));
  try {
    const found = built.find((name) => fs.existsSync(name));
    if (!found) {
      throw new Error(`${built[0]} is not built; run npm install`);
    }
    return require(found).page;
  } catch (error) {
    console.error(
      `trenv-generation: ${file} cannot be used, so random state is shared between instances: ` +
        error.message
    );
    return undefined;
  }
}

const page = open();
const identifier = page && new Uint32Array(page, 16, 4);

/** A function that says, once for each instance, that this is another one than before. */
function watch() {
  if (!identifier) {
    return () => false;
  }
  let [a, b, c, d] = identifier;
  return function changed() {
    if (identifier[0] === a && identifier[1] === b && identifier[2] === c && identifier[3] === d) {
      return false;
    }
    [a, b, c, d] = identifier;
    return true;
  };
}

function replaceMathRandom() {
  const changed = watch();
  const bits = new Uint32Array(1024);
  let left = 0;
  Math.random = function random() {
    if (changed() || left === 0) {
      crypto.randomFillSync(bits);
      left = bits.length;
    }
    left -= 2;
    // 53 bits, as many as a number holds.
    return ((bits[left] >>> 5) * 0x4000000 + (bits[left + 1] >>> 6)) / 0x20000000000000;
  };
}

function withoutCaches() {
  const { randomInt, randomUUID } = crypto;
  const changed = watch();
  crypto.randomInt = Object.assign(function (...bounds) {
    if (changed()) {
      // Each takes 6 of the 6144 bytes that Node draws in advance.
      for (let used = 0; used < 6144; used += 6) {
        randomInt(2);
      }
    }
    return randomInt(...bounds);
  }, randomInt);
  crypto.randomUUID = function (options) {
    return randomUUID({ ...options, disableEntropyCache: true });
  };
  const web = Object.getPrototypeOf(crypto.webcrypto ?? {});
  if (web && Object.hasOwn(web, 'randomUUID')) {
    const uuid = crypto.randomUUID;
    Object.defineProperty(web, 'randomUUID', {
      configurable: true,
      enumerable: true,
      writable: true,
      value: function randomUUID() {
        return uuid();
      },
    });
  }
  syncBuiltinESMExports();
}

if (page) {
  replaceMathRandom();
  withoutCaches();
}

module.exports = { active: Boolean(page), watch };

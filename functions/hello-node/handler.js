// Greets, and proves where its memory comes from: initId is made once, when the function starts,
// and is the same in every instance that comes from one snapshot; the counter goes on from there.
// With ?check=1 the whole heap is compared with initId, which is its digest; with ?churn=1 much is
// allocated and dropped before. The environment variable greeting says how it greets.
'use strict';

const crypto = require('crypto');

const digest = (bytes) => crypto.createHash('sha256').update(bytes).digest('hex').slice(0, 16);
const heap = crypto.randomBytes(1 << 20);
const initId = digest(heap);
const greeting = process.env.greeting || 'Hello';
let counter = 0;

module.exports = (body, query) => {
  counter += 1;
  const at = (counter * 4096) % heap.length;
  const name = query.name || body.toString().trim() || 'world';
  const result = {
    message: `${greeting}, ${name}!`,
    counter,
    init_id: initId,
    heap: heap.subarray(at, at + 8).toString('hex'),
  };
  if (query.churn) {
    // Enough garbage for several collections, old space included.
    const kept = [];
    for (let round = 0; round < 64; round += 1) {
      kept[round % 8] = Array.from({ length: 20000 }, (_, index) => ({ index, text: `${index}` }));
    }
    result.kept = kept.length;
  }
  if (query.check) {
    result.intact = digest(heap) === initId;
  }
  return result;
};

// Scales and filters an image that is made, encoded as PNG and decoded again at start, and kept
// with a pyramid of smaller ones, about 40 MB. Everything is plain JavaScript; zlib comes with Node.
'use strict';

const crypto = require('crypto');
const png = require('./png');

const WIDTH = 1600;
const HEIGHT = 1200;

const initId = crypto.randomBytes(8).toString('hex');
let counter = 0;

// A picture with structure at every scale, different in every process.
function paint(width, height, seed) {
  const pixels = new Float32Array(width * height * 3);
  let state = parseInt(seed.slice(0, 8), 16) | 1;
  const phase = [0, 1, 2].map(() => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32 * 6;
  });
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const at = (y * width + x) * 3;
      for (let c = 0; c < 3; c++) {
        const wave = Math.sin(x / (23 + 11 * c) + phase[c]) * Math.cos(y / (31 - 7 * c));
        pixels[at + c] = 127.5 + 90 * wave + (((x >> 5) ^ (y >> 5)) & 31);
      }
    }
  }
  return { width, height, pixels };
}

function resize(image, width, height) {
  const pixels = new Float32Array(width * height * 3);
  const sx = image.width / width;
  const sy = image.height / height;
  for (let y = 0; y < height; y++) {
    const fy = Math.min(image.height - 1.001, Math.max(0, (y + 0.5) * sy - 0.5));
    const y0 = Math.floor(fy);
    for (let x = 0; x < width; x++) {
      const fx = Math.min(image.width - 1.001, Math.max(0, (x + 0.5) * sx - 0.5));
      const x0 = Math.floor(fx);
      const dx = fx - x0;
      const dy = fy - y0;
      const a = (y0 * image.width + x0) * 3;
      const b = a + image.width * 3;
      const to = (y * width + x) * 3;
      for (let c = 0; c < 3; c++) {
        const top = image.pixels[a + c] * (1 - dx) + image.pixels[a + 3 + c] * dx;
        const low = image.pixels[b + c] * (1 - dx) + image.pixels[b + 3 + c] * dx;
        pixels[to + c] = top * (1 - dy) + low * dy;
      }
    }
  }
  return { width, height, pixels };
}

const KERNELS = {
  blur: [1, 2, 1, 2, 4, 2, 1, 2, 1].map((v) => v / 16),
  sharpen: [0, -1, 0, -1, 5, -1, 0, -1, 0],
  edges: [-1, -1, -1, -1, 8, -1, -1, -1, -1],
};

function filter(image, kernel) {
  const { width, height } = image;
  const pixels = new Float32Array(image.pixels);
  for (let y = 1; y < height - 1; y++) {
    for (let x = 1; x < width - 1; x++) {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let k = 0; k < 9; k++) {
          const row = y + Math.floor(k / 3) - 1;
          sum += kernel[k] * image.pixels[(row * width + x + (k % 3) - 1) * 3 + c];
        }
        pixels[(y * width + x) * 3 + c] = sum;
      }
    }
  }
  return { width, height, pixels };
}

const encoded = png.encode(paint(WIDTH, HEIGHT, initId));
const levels = [png.decode(encoded)];
for (let width = WIDTH / 2; width >= 100; width /= 2) {
  levels.push(resize(levels[levels.length - 1], width, (width * HEIGHT) / WIDTH));
}
const encodedDigest = crypto.createHash('sha256').update(encoded).digest('hex');

// With ?format=png the picture itself, else what is known of it. A PNG in the body is used instead
// of the function's own.
module.exports = (body, query) => {
  counter += 1;
  const width = Math.min(WIDTH, Math.max(8, Number(query.width || 160) | 0));
  const name = query.filter || 'sharpen';
  if (!KERNELS[name]) {
    throw new Error(`no filter ${name}; there are ${Object.keys(KERNELS).join(', ')}`);
  }
  let source;
  if (body.length > 0) {
    source = png.decode(body);
  } else {
    source = levels.filter((level) => level.width >= width).pop();
  }
  const height = Math.max(1, Math.round((width * source.height) / source.width));
  const picture = filter(resize(source, width, height), KERNELS[name]);
  const result = png.encode(picture);
  if (query.format === 'png') {
    return result;
  }
  let sum = 0;
  for (const value of picture.pixels) sum += value;
  return {
    counter,
    init_id: initId,
    source_digest: encodedDigest.slice(0, 16),
    width: picture.width,
    height: picture.height,
    filter: name,
    mean: Number((sum / picture.pixels.length).toFixed(3)),
    png_bytes: result.length,
    png_digest: crypto.createHash('sha256').update(result).digest('hex').slice(0, 16),
  };
};

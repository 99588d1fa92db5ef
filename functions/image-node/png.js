// Reads and writes PNG of 8 bits a channel, RGB or RGBA, without interlacing.
'use strict';

const zlib = require('zlib');

const SIGNATURE = Buffer.from([137, 80, 78, 71, 13, 10, 26, 10]);

const CRC = new Uint32Array(256).map((_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

function crc(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) sum = CRC[(sum ^ byte) & 255] ^ (sum >>> 8);
  return (sum ^ 0xffffffff) >>> 0;
}

function chunk(kind, data) {
  const named = Buffer.concat([Buffer.from(kind, 'latin1'), data]);
  const out = Buffer.alloc(named.length + 8);
  out.writeUInt32BE(data.length, 0);
  named.copy(out, 4);
  out.writeUInt32BE(crc(named), named.length + 4);
  return out;
}

exports.encode = ({ width, height, pixels }) => {
  const head = Buffer.alloc(13);
  head.writeUInt32BE(width, 0);
  head.writeUInt32BE(height, 4);
  head.set([8, 2, 0, 0, 0], 8);
  const stride = width * 3;
  const rows = Buffer.alloc((stride + 1) * height);
  for (let y = 0; y < height; y++) {
    const row = y * (stride + 1);
    rows[row] = 1; // Each byte less the one of the pixel to the left.
    for (let i = 0; i < stride; i++) {
      const at = y * stride + i;
      const left = i < 3 ? 0 : clamp(pixels[at - 3]);
      rows[row + 1 + i] = clamp(pixels[at]) - left;
    }
  }
  const data = zlib.deflateSync(rows, { level: 1 });
  const end = chunk('IEND', Buffer.alloc(0));
  return Buffer.concat([SIGNATURE, chunk('IHDR', head), chunk('IDAT', data), end]);
};

exports.decode = (bytes) => {
  if (!bytes.subarray(0, 8).equals(SIGNATURE)) throw new Error('this is no PNG');
  let at = 8;
  let head;
  const data = [];
  while (at + 12 <= bytes.length) {
    const length = bytes.readUInt32BE(at);
    const kind = bytes.toString('latin1', at + 4, at + 8);
    const content = bytes.subarray(at + 8, at + 8 + length);
    if (kind === 'IHDR') head = content;
    if (kind === 'IDAT') data.push(content);
    if (kind === 'IEND') break;
    at += length + 12;
  }
  if (!head || head.length < 13) throw new Error('the PNG has no head');
  const width = head.readUInt32BE(0);
  const height = head.readUInt32BE(4);
  const channels = { 2: 3, 6: 4 }[head[9]];
  if (head[8] !== 8 || !channels || head[12] !== 0) {
    throw new Error('only PNGs of 8-bit RGB or RGBA without interlacing are read');
  }
  if (width * height > 1 << 24) throw new Error('the PNG is larger than 16 megapixels');
  const stride = width * channels;
  const rows = zlib.inflateSync(Buffer.concat(data), { maxOutputLength: (stride + 1) * height });
  if (rows.length !== (stride + 1) * height) throw new Error('the PNG is cut short');
  const plain = Buffer.alloc(stride * height);
  for (let y = 0; y < height; y++) {
    unfilter(rows, y * (stride + 1), plain, y * stride, stride, channels, y > 0);
  }
  const pixels = new Float32Array(width * height * 3);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) pixels[i * 3 + c] = plain[i * channels + c];
  }
  return { width, height, pixels };
};

function clamp(value) {
  return value < 0 ? 0 : value > 255 ? 255 : Math.round(value);
}

function unfilter(from, start, to, at, stride, channels, above) {
  const kind = from[start];
  for (let i = 0; i < stride; i++) {
    const a = i < channels ? 0 : to[at + i - channels];
    const b = above ? to[at + i - stride] : 0;
    const c = above && i >= channels ? to[at + i - stride - channels] : 0;
    let guess;
    if (kind === 0) guess = 0;
    else if (kind === 1) guess = a;
    else if (kind === 2) guess = b;
    else if (kind === 3) guess = (a + b) >> 1;
    else if (kind === 4) guess = paeth(a, b, c);
    else throw new Error(`the PNG has a row of filter ${kind}`);
    to[at + i] = from[start + 1 + i] + guess;
  }
}

function paeth(a, b, c) {
  const p = a + b - c;
  const [pa, pb, pc] = [Math.abs(p - a), Math.abs(p - b), Math.abs(p - c)];
  if (pa <= pb && pa <= pc) return a;
  return pb <= pc ? b : c;
}

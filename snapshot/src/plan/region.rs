//! Writes the restorer's region: code, programs, data, frames and stacks at fixed addresses.

use trenv_restorer::wire::{IMMEDIATE, Op, STACK, check, verb};

use super::PlanError;

/// The free-standing restorer, built by the build script, and where it begins.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/restorer.image"));
/// Offset of the entry point in [`IMAGE`].
pub const ENTRY: u64 = include!(concat!(env!("OUT_DIR"), "/restorer.entry"));

/// The loader, an executable.
pub const LOADER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/loader.elf"));

const PAGE: u64 = 4096;

/// The region under construction.
#[derive(Debug)]
pub struct Region {
    base: u64,
    code: u64,
    data: Vec<u8>,
    /// Bytes behind the data that begin as zeroes: stacks.
    room: u64,
    /// Bytes that were not kept, for they lie above the limit.
    excess: u64,
    limit: u64,
    /// Number of the first sentence.
    first: u32,
    sentences: Vec<String>,
}

impl Region {
    /// A region whose sentences are numbered from `first` on.
    pub fn new(base: u64, limit: u64, first: u32) -> Self {
        let code = (IMAGE.len() as u64).next_multiple_of(PAGE);
        Self {
            base,
            code,
            data: Vec::new(),
            room: 0,
            excess: 0,
            limit,
            first,
            sentences: Vec::new(),
        }
    }

    pub fn entry(&self) -> u64 {
        self.base + ENTRY
    }

    /// Bytes of code; what follows is data.
    pub fn code_length(&self) -> u64 {
        self.code
    }

    pub fn length(&self) -> u64 {
        (self.code + self.data.len() as u64).next_multiple_of(PAGE) + self.room + self.excess
    }

    /// Puts bytes into the region and tells their address. Above the limit they only count: what a
    /// manifest says must not make this program grow.
    pub fn put(&mut self, bytes: &[u8], align: usize) -> u64 {
        if self.code + (self.data.len() + bytes.len()) as u64 > self.limit {
            self.excess += (bytes.len() as u64).next_multiple_of(PAGE);
            return self.base + self.code;
        }
        self.data.resize(self.data.len().next_multiple_of(align), 0);
        let at = self.base + self.code + self.data.len() as u64;
        self.data.extend_from_slice(bytes);
        at
    }

    pub fn put_words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.put(&bytes, 8)
    }

    /// Puts a C string.
    pub fn put_text(&mut self, text: &str) -> u64 {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.put(&bytes, 1)
    }

    /// Writes over bytes that were put before.
    pub fn set(&mut self, address: u64, bytes: &[u8]) {
        let at = (address - self.base - self.code) as usize;
        if let Some(place) = self.data.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// Room for stacks; call it once, after everything was put.
    pub fn reserve(&mut self, bytes: u64) -> u64 {
        let at = self.base + self.length();
        self.room += bytes.next_multiple_of(PAGE);
        at
    }

    pub fn put_program(&mut self, program: &Program) -> u64 {
        self.put(&program.bytes(), 8)
    }

    /// Number of a sentence about a step, for a failure's report.
    pub fn sentence(&mut self, text: String) -> u32 {
        self.sentences.push(text);
        self.next_sentence() - 1
    }

    /// Number of the sentence that comes next.
    pub fn next_sentence(&self) -> u32 {
        self.first + self.sentences.len() as u32
    }

    /// A stack of its own for a task that this region's programs make; its end.
    pub fn put_stack(&mut self) -> u64 {
        self.put(&[0; STACK as usize], 16) + STACK
    }

    /// The region's bytes from its base on, stacks left out.
    pub fn finish(self) -> Result<(Vec<u8>, Vec<String>), PlanError> {
        if self.length() > self.limit {
            return Err(PlanError::TooLarge {
                length: self.length(),
                limit: self.limit,
            });
        }
        let mut bytes = IMAGE.to_vec();
        bytes.resize(self.code as usize, 0);
        bytes.extend(self.data);
        Ok((bytes, self.sentences))
    }
}

const PLAIN: Op = Op {
    verb: verb::SYSCALL,
    check: check::OK,
    dst: IMMEDIATE,
    what: 0,
    nr: 0,
    args: [0; 6],
    from: [IMMEDIATE; 8],
    expect: 0,
};

/// A list of steps under construction.
#[derive(Debug, Default)]
pub struct Program {
    ops: Vec<Op>,
    what: u32,
}

impl Program {
    /// Names what the following steps do.
    pub fn about(&mut self, sentence: u32) -> &mut Self {
        self.what = sentence;
        self
    }

    /// The program as the restorer reads it.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity((self.ops.len() + 1) * size_of::<Op>());
        for op in self.ops.iter().chain([&Op {
            verb: verb::END,
            ..PLAIN
        }]) {
            bytes.extend(op.verb.to_ne_bytes());
            bytes.extend([op.check, op.dst]);
            bytes.extend(op.what.to_ne_bytes());
            bytes.extend(op.nr.to_ne_bytes());
            bytes.extend(op.args.iter().flat_map(|arg| arg.to_ne_bytes()));
            bytes.extend(op.from);
            bytes.extend(op.expect.to_ne_bytes());
        }
        bytes
    }

    fn push(&mut self, op: Op) -> &mut Op {
        self.ops.push(Op {
            what: self.what,
            ..op
        });
        let last = self.ops.len() - 1;
        &mut self.ops[last]
    }

    /// A system call that must not fail.
    pub fn call<const N: usize>(&mut self, nr: i64, args: [u64; N]) -> &mut Self {
        let mut all = [0; 6];
        all[..N].copy_from_slice(&args);
        self.push(Op {
            nr: nr as u64,
            args: all,
            ..PLAIN
        });
        self
    }

    /// The last call must return exactly this.
    pub fn exactly(&mut self, expect: u64) -> &mut Self {
        if let Some(op) = self.ops.last_mut() {
            op.check = check::EXACT;
            op.expect = expect;
        }
        self
    }

    /// The last call may fail.
    pub fn or_not(&mut self) -> &mut Self {
        if let Some(op) = self.ops.last_mut() {
            op.check = check::ANY;
        }
        self
    }

    /// The last call is made again until its result is as it must be.
    pub fn until_done(&mut self) -> &mut Self {
        if let Some(op) = self.ops.last_mut() {
            op.verb = verb::RETRY;
        }
        self
    }

    /// The last call's result goes to a slot.
    pub fn into(&mut self, slot: u8) -> &mut Self {
        if let Some(op) = self.ops.last_mut() {
            op.dst = slot;
        }
        self
    }

    /// An argument of the last call comes from a slot.
    pub fn from(&mut self, argument: usize, slot: u8) -> &mut Self {
        if let Some(op) = self.ops.last_mut() {
            op.from[argument] = slot;
        }
        self
    }

    /// Offset, in the program, of the first argument of the call that comes next.
    pub fn next_argument(&self) -> u64 {
        (self.ops.len() * size_of::<Op>() + std::mem::offset_of!(Op, args)) as u64
    }

    /// A verb of the restorer's own.
    pub fn verb<const N: usize>(&mut self, verb: u16, args: [u64; N]) -> &mut Self {
        let mut all = [0; 6];
        all[..N].copy_from_slice(&args);
        self.push(Op {
            verb,
            args: all,
            ..PLAIN
        });
        self
    }
}

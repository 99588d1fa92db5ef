//! Hostile input for parsers.
//!
//! [`run`] takes seeds, changes them, and hands the results to a parser that must not panic. Changes
//! know how our formats are made: numbers are varints or little-endian words, and lists have their
//! length before them. The generator has a fixed beginning, so a test meets the same inputs each
//! time; `TRENV_FUZZ_SECONDS` makes a run longer, with inputs of its own.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// Input on which a parser may spend this long before it counts as a hang.
const SLOW: Duration = Duration::from_secs(2);
const LONGEST: usize = 1 << 20;

/// A seeded generator (xorshift64*).
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// A number where parsers go wrong.
    fn number(&mut self) -> u64 {
        let power = 1u64 << self.below(64);
        match self.below(8) {
            0 => self.next() % 4,
            1 => power,
            2 => power - 1,
            3 => u64::MAX - self.next() % 4,
            4 => power.wrapping_mul(4096),
            5 => self.next() >> self.below(64),
            6 => 0x7fff_ffff_f000 - 4096 * (self.next() % 4),
            _ => self.next() % 256,
        }
    }
}

/// Hands `inputs` changed seeds to `parse`, and every file of `corpus` as it is.
///
/// # Panics
/// When `parse` does, or takes longer than 2 s; the input is kept beside the corpus as
/// `failed-TIME`, to be committed with the fix.
pub fn run(corpus: &Path, seeds: &[Vec<u8>], inputs: u64, mut parse: impl FnMut(&[u8])) {
    let mut known: Vec<Vec<u8>> = seeds.to_vec();
    if let Ok(entries) = std::fs::read_dir(corpus) {
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        known.extend(paths.iter().filter_map(|path| std::fs::read(path).ok()));
    }
    let seconds = std::env::var("TRENV_FUZZ_SECONDS");
    let seconds = seconds.ok().and_then(|text| text.parse().ok());
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    if until.is_some() {
        random.0 ^= now() | 1;
    }
    for seed in &known {
        attempt(corpus, seed, &mut parse);
    }
    let mut done = 0;
    while until.map_or(done < inputs, |until| Instant::now() < until) {
        let mut input = known
            .get(random.below(known.len()))
            .cloned()
            .unwrap_or_default();
        for _ in 0..=random.below(4) {
            let other = known.get(random.below(known.len())).map_or(&[][..], |o| o);
            change(&mut input, other, &mut random);
        }
        attempt(corpus, &input, &mut parse);
        done += 1;
    }
    eprintln!(
        "{}: {done} inputs from {} seeds",
        corpus.display(),
        known.len()
    );
}

fn now() -> u64 {
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    time.map_or(0, |time| time.as_nanos() as u64)
}

fn attempt(corpus: &Path, input: &[u8], parse: &mut impl FnMut(&[u8])) {
    let begun = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| {
        parse(input);
        assert!(
            begun.elapsed() < SLOW,
            "the input took {:?}",
            begun.elapsed()
        );
    }));
    if let Err(panic) = result {
        let path = corpus.join(format!("failed-{}", now()));
        match std::fs::write(&path, input) {
            Ok(()) => eprintln!("The input is in {}", path.display()),
            Err(err) => eprintln!("The input cannot be kept in {}: {err}", path.display()),
        }
        resume_unwind(panic);
    }
}

fn change(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if input.is_empty() {
        input.extend_from_slice(other);
    }
    let at = random.below(input.len());
    let length = 1 + random.below(16.min(input.len().saturating_sub(at)));
    let end = (at + length).min(input.len());
    match random.below(8) {
        0 => input[at..end]
            .iter_mut()
            .for_each(|b| *b = random.next() as u8),
        1 => input.truncate(at),
        2 => drop(input.drain(at..end)),
        3 => {
            let part = input[at..end].to_vec();
            input.splice(at..at, part);
        }
        4 => {
            let from = random.below(other.len());
            let to = (from + 1 + random.below(64)).min(other.len());
            input.splice(at..end, other[from..to].iter().copied());
        }
        5 => {
            let word = random.number().to_le_bytes();
            let end = (at + 8).min(input.len());
            input[at..end].copy_from_slice(&word[..end - at]);
        }
        // One varint for another: what follows keeps its meaning.
        _ => {
            let number = input[at..].iter().position(|byte| byte & 0x80 == 0);
            let end = number.map_or(input.len(), |last| at + last + 1);
            input.splice(at..end, varint(random.number()));
        }
    }
    input.truncate(LONGEST);
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parser_that_trusts_a_length_is_found_out() {
        let directory = std::env::temp_dir().join(format!("trenv-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let found = catch_unwind(|| {
            run(&directory, &[vec![3, 1, 2, 3]], 10_000, |bytes| {
                if let [length, rest @ ..] = bytes {
                    let _ = &rest[..usize::from(*length)];
                }
            });
        });
        let kept = std::fs::read_dir(&directory).unwrap().count();
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(found.is_err());
        assert_eq!(kept, 1);
    }
}

//! Which addresses of a running address space still stand for which of its skeleton.
//!
//! A page that was never filled can be given back, unmapped or moved before it is first touched.
//! What is asked for at an address is the page that the skeleton had where that memory lay then,
//! or zeroes once it was given back.

use std::collections::BTreeMap;

/// Ranges whose missing pages are the skeleton's.
#[derive(Debug, Clone, Default)]
pub struct Spans {
    /// By start: end, and the skeleton's address of the start.
    spans: BTreeMap<u64, (u64, u64)>,
}

impl Spans {
    /// A range that lies where the skeleton has it.
    pub fn insert(&mut self, start: u64, length: u64) {
        self.put(start, start + length, start);
    }

    /// The skeleton's address of a page; none where missing means zero.
    pub fn origin(&self, at: u64) -> Option<u64> {
        let (start, (end, origin)) = self.spans.range(..=at).next_back()?;
        (at < *end).then(|| origin + (at - start))
    }

    /// Missing means zero there from now on.
    pub fn forget(&mut self, start: u64, end: u64) {
        self.take(start, end);
    }

    /// Memory was moved.
    pub fn remap(&mut self, from: u64, to: u64, length: u64) {
        let moved = self.take(from, from.saturating_add(length));
        self.forget(to, to.saturating_add(length));
        for (start, end, origin) in moved {
            let at = to + (start - from);
            self.put(at, at + (end - start), origin);
        }
    }

    fn put(&mut self, start: u64, end: u64, origin: u64) {
        if start < end {
            self.spans.insert(start, (end, origin));
        }
    }

    /// Takes a range out: start, end and origin of each part.
    fn take(&mut self, start: u64, end: u64) -> Vec<(u64, u64, u64)> {
        let first = self.spans.range(..start).next_back();
        let first = first.map_or(start, |(first, _)| *first);
        let touched: Vec<u64> = self
            .spans
            .range(first..end.max(first))
            .map(|one| *one.0)
            .collect();
        let mut taken = Vec::new();
        for at in touched {
            let Some((its_end, origin)) = self.spans.remove(&at) else {
                continue;
            };
            let (from, to) = (at.max(start), its_end.min(end));
            if from >= to {
                self.put(at, its_end, origin);
                continue;
            }
            self.put(at, from, origin);
            self.put(to, its_end, origin + (to - at));
            taken.push((from, to, origin + (from - at)));
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_back_has_no_origin() {
        let mut spans = Spans::default();
        spans.insert(100, 100);
        spans.forget(120, 130);
        assert_eq!(spans.origin(119), Some(119));
        assert_eq!((spans.origin(120), spans.origin(129)), (None, None));
        assert_eq!(spans.origin(130), Some(130));
        assert_eq!((spans.origin(99), spans.origin(200)), (None, None));
    }

    #[test]
    fn what_was_moved_keeps_its_origin() {
        let mut spans = Spans::default();
        spans.insert(100, 100);
        spans.insert(500, 100);
        spans.forget(150, 160);
        // Over a part of another range, with a hole of its own.
        spans.remap(140, 540, 40);
        assert_eq!((spans.origin(139), spans.origin(140)), (Some(139), None));
        assert_eq!(
            (spans.origin(540), spans.origin(549)),
            (Some(140), Some(149))
        );
        assert_eq!((spans.origin(550), spans.origin(560)), (None, Some(160)));
        assert_eq!(
            (spans.origin(539), spans.origin(580)),
            (Some(539), Some(580))
        );
        spans.remap(540, 1540, 10);
        assert_eq!(spans.origin(1541), Some(141));
    }

    /// Random changes, against a table of single addresses.
    #[test]
    fn any_order_of_changes_is_followed() {
        let mut spans = Spans::default();
        let mut table = vec![None; 512];
        spans.insert(64, 128);
        spans.insert(300, 60);
        (64..192)
            .chain(300..360)
            .for_each(|at| table[at] = Some(at as u64));
        let mut state = 7u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..5000 {
            let (from, to, length) = (random(480), random(480), 1 + random(24));
            let apart = from + length <= to || to + length <= from;
            if random(3) > 0 && apart {
                spans.remap(from, to, length);
                for index in 0..length as usize {
                    table[to as usize + index] = table[from as usize + index].take();
                }
            } else if random(20) == 0 {
                spans.forget(from, from + length);
                table[from as usize..(from + length) as usize].fill(None);
            }
            for (at, origin) in table.iter().enumerate() {
                assert_eq!(spans.origin(at as u64), *origin, "{at}");
            }
        }
    }
}

//! Which pages of the data file are free: those that no record of the catalogue names.

use std::fmt;

/// Consecutive pages of the data file; page 0 is the first after the superblock's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Run {
    pub start: u64,
    pub pages: u64,
}

impl Run {
    pub fn end(&self) -> u64 {
        self.start + self.pages
    }
}

/// Two records name the same page, or one names a page outside the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Conflict(pub Run);

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {}..{}", self.0.start, self.0.end())
    }
}

/// Free runs in ascending order; no two touch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FreeSpace {
    runs: Vec<Run>,
}

impl FreeSpace {
    /// What `used` leaves free of `capacity` pages, and the used runs that overlap an earlier one
    /// or lie outside. Pages in conflict count as used.
    pub fn around(mut used: Vec<Run>, capacity: u64) -> (Self, Vec<Conflict>) {
        used.sort_unstable();
        let mut runs = Vec::new();
        let mut conflicts = Vec::new();
        let mut at = 0;
        for run in used.iter().filter(|run| run.pages > 0) {
            let Some(end) = run
                .start
                .checked_add(run.pages)
                .filter(|end| *end <= capacity)
            else {
                conflicts.push(Conflict(*run));
                if run.start < capacity {
                    push_gap(&mut runs, at, run.start);
                    at = capacity;
                }
                continue;
            };
            if run.start < at {
                conflicts.push(Conflict(*run));
            }
            push_gap(&mut runs, at, run.start);
            at = at.max(end);
        }
        push_gap(&mut runs, at, capacity);
        (Self { runs }, conflicts)
    }

    pub fn free_pages(&self) -> u64 {
        self.runs.iter().map(|run| run.pages).sum()
    }

    /// Takes up to `want` consecutive pages. The largest run is split, so that a template whose
    /// size is not known ahead lies in few pieces; but when a smaller run is enough for all of
    /// `want`, that one serves, so that small templates fill small gaps.
    pub fn take(&mut self, want: u64) -> Option<Run> {
        if want == 0 {
            return None;
        }
        let enough = (0..self.runs.len())
            .filter(|i| self.runs[*i].pages >= want)
            .min_by_key(|i| self.runs[*i].pages);
        let chosen = enough.or_else(|| (0..self.runs.len()).max_by_key(|i| self.runs[*i].pages))?;
        let run = &mut self.runs[chosen];
        let taken = Run {
            start: run.start,
            pages: run.pages.min(want),
        };
        run.start += taken.pages;
        run.pages -= taken.pages;
        if run.pages == 0 {
            self.runs.remove(chosen);
        }
        Some(taken)
    }

    /// Puts back the rest of a run that was taken from the front of a gap.
    pub fn put_back(&mut self, run: Run) {
        if run.pages == 0 {
            return;
        }
        let at = self.runs.partition_point(|other| other.start < run.start);
        self.runs.insert(at, run);
        if at + 1 < self.runs.len() && self.runs[at].end() == self.runs[at + 1].start {
            self.runs[at].pages += self.runs[at + 1].pages;
            self.runs.remove(at + 1);
        }
        if at > 0 && self.runs[at - 1].end() == self.runs[at].start {
            self.runs[at - 1].pages += self.runs[at].pages;
            self.runs.remove(at);
        }
    }
}

fn push_gap(runs: &mut Vec<Run>, from: u64, to: u64) {
    if from < to {
        runs.push(Run {
            start: from,
            pages: to - from,
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(start: u64, pages: u64) -> Run {
        Run { start, pages }
    }

    #[test]
    fn small_requests_fill_small_gaps_and_large_ones_take_the_largest() {
        let (mut space, _) = FreeSpace::around(vec![run(4, 1), run(10, 5)], 100);
        assert_eq!(space.take(3), Some(run(0, 3)));
        assert_eq!(space.take(5), Some(run(5, 5)));
        assert_eq!(space.take(u64::MAX), Some(run(15, 85)));
        assert_eq!(space.take(2), Some(run(3, 1)));
        assert_eq!(space.take(1), None);
    }

    #[test]
    fn overlapping_and_outlying_runs_are_named_and_count_as_used() {
        let used = vec![run(0, 4), run(2, 4), run(8, 1), run(9, 5), run(u64::MAX, 2)];
        let (space, conflicts) = FreeSpace::around(used, 10);
        let named: Vec<Run> = conflicts.iter().map(|conflict| conflict.0).collect();
        assert_eq!(named, [run(2, 4), run(9, 5), run(u64::MAX, 2)]);
        assert_eq!(space.free_pages(), 2);
    }

    proptest! {
        /// Whatever is taken and given back, no page is handed out twice and none is lost.
        #[test]
        fn pages_are_neither_shared_nor_lost(
            steps in prop::collection::vec((any::<bool>(), 1u64..40), 1..200),
            capacity in 1u64..500,
        ) {
            let (mut space, _) = FreeSpace::around(Vec::new(), capacity);
            let mut held: Vec<Run> = Vec::new();
            for (take, size) in steps {
                if take {
                    match space.take(size) {
                        Some(taken) => {
                            prop_assert!(taken.pages >= 1 && taken.pages <= size);
                            held.push(taken);
                        }
                        None => prop_assert_eq!(space.free_pages(), 0),
                    }
                } else if !held.is_empty() {
                    let given = held.swap_remove(size as usize % held.len());
                    space.put_back(given);
                }
                let (expected, conflicts) = FreeSpace::around(held.clone(), capacity);
                prop_assert!(conflicts.is_empty());
                prop_assert_eq!(&space, &expected);
            }
        }

        /// Free and used pages make up the whole, for any records, sound or not.
        #[test]
        fn free_space_is_what_no_record_names(
            used in prop::collection::vec((0u64..300, 0u64..60), 0..30),
            capacity in 1u64..250,
        ) {
            let runs: Vec<Run> = used.iter().map(|(start, pages)| run(*start, *pages)).collect();
            let (mut space, _) = FreeSpace::around(runs.clone(), capacity);
            while let Some(free) = space.take(u64::MAX) {
                prop_assert!(free.end() <= capacity);
                for used in runs.iter().filter(|run| run.pages > 0) {
                    prop_assert!(free.end() <= used.start || used.end() <= free.start);
                }
            }
        }
    }
}

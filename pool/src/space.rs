//! Which pages of the data file are free: those that no record of the catalogue names.

use std::collections::BTreeMap;
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

/// A record names pages outside the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outside(pub Run);

impl fmt::Display for Outside {
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
    /// What `used` leaves free of `capacity` pages, and the used runs that lie outside. Runs may
    /// overlap: several records may name a page.
    pub fn around(mut used: Vec<Run>, capacity: u64) -> (Self, Vec<Outside>) {
        used.sort_unstable();
        let mut runs = Vec::new();
        let mut outside = Vec::new();
        let mut at = 0;
        for run in used.iter().filter(|run| run.pages > 0) {
            let Some(end) = run
                .start
                .checked_add(run.pages)
                .filter(|end| *end <= capacity)
            else {
                outside.push(Outside(*run));
                if run.start < capacity {
                    push_gap(&mut runs, at, run.start);
                    at = capacity;
                }
                continue;
            };
            push_gap(&mut runs, at, run.start);
            at = at.max(end);
        }
        push_gap(&mut runs, at, capacity);
        (Self { runs }, outside)
    }

    /// The free parts of a run.
    pub fn within(&self, run: Run) -> impl Iterator<Item = Run> + '_ {
        let first = self.runs.partition_point(|free| free.end() <= run.start);
        let end = run.start.saturating_add(run.pages);
        let overlapping = self.runs[first..].iter();
        overlapping
            .take_while(move |free| free.start < end)
            .map(move |free| {
                let start = free.start.max(run.start);
                let pages = free.end().min(end) - start;
                Run { start, pages }
            })
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

/// How many pages each of `owners` has that no other names; runs come with the number of their owner.
pub(crate) fn unshared(runs: impl Iterator<Item = (usize, Run)>, owners: usize) -> Vec<u64> {
    let mut bounds: Vec<(u64, bool, usize)> = runs
        .flat_map(|(owner, run)| {
            let end = run.start.saturating_add(run.pages);
            [(run.start, true, owner), (end, false, owner)]
        })
        .collect();
    bounds.sort_unstable();
    let mut pages = vec![0; owners];
    // Who names the pages at hand, and how often: a template may hold a page twice.
    let mut naming: BTreeMap<usize, usize> = BTreeMap::new();
    let mut at = 0;
    for (bound, begins, owner) in bounds {
        if let (Some((only, _)), 1) = (naming.first_key_value(), naming.len()) {
            pages[*only] += bound - at;
        }
        at = bound;
        let count = naming.entry(owner).or_default();
        if begins {
            *count += 1;
        } else if *count > 1 {
            *count -= 1;
        } else {
            naming.remove(&owner);
        }
    }
    pages
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
    fn overlapping_and_outlying_runs_count_as_used_and_the_latter_are_named() {
        let used = vec![run(0, 4), run(2, 4), run(8, 1), run(9, 5), run(u64::MAX, 2)];
        let (space, outside) = FreeSpace::around(used, 10);
        let named: Vec<Run> = outside.iter().map(|outside| outside.0).collect();
        assert_eq!(named, [run(9, 5), run(u64::MAX, 2)]);
        assert_eq!(space.free_pages(), 2);
    }

    #[test]
    fn the_free_parts_of_a_run_are_those_that_nobody_names() {
        let (space, _) = FreeSpace::around(vec![run(2, 3), run(4, 3), run(9, 1)], 20);
        let within = |start, pages| space.within(run(start, pages)).collect::<Vec<_>>();
        assert_eq!(within(0, 20), [run(0, 2), run(7, 2), run(10, 10)]);
        assert_eq!(within(1, 7), [run(1, 1), run(7, 1)]);
        assert_eq!(within(2, 5), []);
        assert_eq!(within(15, u64::MAX), [run(15, 5)]);
    }

    #[test]
    fn a_page_is_its_owner_s_alone_when_no_other_names_it() {
        let runs = [
            (0, run(0, 10)),
            (1, run(2, 3)),
            (2, run(4, 2)),
            (1, run(20, 4)),
            // Twice in one template.
            (1, run(21, 1)),
        ];
        assert_eq!(unshared(runs.into_iter(), 4), [6, 4, 0, 0]);
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
                let (expected, outside) = FreeSpace::around(held.clone(), capacity);
                prop_assert!(outside.is_empty());
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

//! Pages that instances were seen to fault in, in the order of their first use, for each input.

use std::collections::HashSet;

use super::image::Image;
use super::working_set_file::WorkingSetFile;
use crate::manifest::PAGE;
use crate::recording::{Drift, Recorded, Rounds, Touch};

/// The pages of one input, and the file that later instances get them from.
#[derive(Debug, Default)]
pub struct RecordedPages {
    /// In the order of first use, by the skeleton's addresses.
    pub pages: Vec<u64>,
    pub file: Option<WorkingSetFile>,
    pub rounds: Rounds,
}

impl RecordedPages {
    /// Notes a trace of what these pages lacked; `true` when it is to be recorded.
    pub fn note(&mut self, trace: &[u64], agreeing: usize) -> bool {
        let drift = Drift {
            known: self.pages.len(),
            outside: trace.len(),
            unchanged: None,
        };
        self.rounds.look();
        self.rounds.note(drift, agreeing)
    }

    /// Adds the pages of a trace; tells whether there were new ones.
    pub fn add(&mut self, trace: &[u64]) -> bool {
        let mut known: HashSet<u64> = self.pages.iter().copied().collect();
        let before = self.pages.len();
        let new = trace.iter().filter(|page| known.insert(**page));
        self.pages.extend(new);
        self.pages.len() > before
    }

    /// As it is told.
    pub fn recorded(&self, input: &str, image: &Image) -> Recorded {
        let mut recorded = self.rounds.recorded(input, true);
        for at in &self.pages {
            if let Some(area) = image.area(*at) {
                recorded.push(area.process, area.start + (at - area.at), Touch::Used);
            }
        }
        recorded
    }

    /// As it was told.
    pub fn of(recorded: &Recorded, image: &Image) -> Self {
        let pages = recorded.pages(Touch::Used);
        let pages = pages.filter_map(|(process, at)| {
            let mut areas = image.areas.iter();
            let area = areas.find(|area| {
                let end = area.start + area.length;
                area.process == process && area.start <= at && at + PAGE <= end
            })?;
            Some(area.at + (at - area.start))
        });
        Self {
            pages: pages.collect(),
            file: None,
            rounds: Rounds::of(recorded),
        }
    }
}

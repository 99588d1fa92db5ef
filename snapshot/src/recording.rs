//! What is recorded of the pages that calls touch, by the input that the caller names.
//!
//! A recording is iterated: each tenancy that ends is a round, which adds the pages that it touched
//! beyond those known. It is stable once a round agrees with those before it, which is when it touched
//! few pages that were not known; after five rounds without agreement it rests. From then on every
//! sixteenth tenancy is looked at, and the pages that it touched beyond the recorded ones are the
//! drift; where these are many, as when an input has changed, recording begins again.
//!
//! The shim keeps recordings in a file for each template and start method, so that a zygote that is
//! built again begins with what was learnt, and so that people can read them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use trenv_pool::TemplateId;

use crate::manifest::PAGE;
use crate::methods::Method;

/// Inputs of a template that are recorded apart; what comes beyond counts as the one without a name.
const MOST_INPUTS: usize = 16;
/// Tenancies to learn from, unless they agree earlier.
const MOST_ROUNDS: usize = 5;
/// Of a recording that is made, each tenancy of so many is looked at.
const LOOK: usize = 16;
/// More than one page outside for so many recorded ones begins a recording again.
const CHANGED: usize = 4;

/// The recorded pages of one input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Recorded {
    /// As the caller names it; empty for calls that name none.
    pub input: String,
    pub rounds: usize,
    pub stable: bool,
    pub drift: Option<Drift>,
    /// The ranges are in the order of first use, not by address.
    pub first_use: bool,
    pub ranges: Vec<Range>,
}

/// Recorded pages that are neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// The process, by its number in the manifest, and its address.
    pub process: usize,
    pub start: u64,
    pub pages: u64,
    pub touch: Touch,
}

/// How calls touch a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Touch {
    /// It is written, and copied ahead.
    Written,
    /// It is read, and clones have it mapped: a file's, or an attached one.
    Read,
    /// Read or written: the method cannot tell.
    Used,
}

/// How the last tenancy that was looked at differed from what was recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drift {
    /// Pages recorded before.
    pub known: usize,
    /// Pages that it touched beyond them.
    pub outside: usize,
    /// Recorded pages that it left as they were; none where the method cannot tell.
    pub unchanged: Option<usize>,
}

impl Drift {
    /// Pages outside, for each page that the tenancy can have touched.
    #[must_use]
    pub fn share_outside(&self) -> f64 {
        share(self.outside, self.known + self.outside)
    }

    /// The part of the recorded pages that was left as it was.
    #[must_use]
    pub fn share_unchanged(&self) -> Option<f64> {
        Some(share(self.unchanged?, self.known))
    }
}

fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole.max(1) as f64
}

impl Recorded {
    /// Adds a page; a neighbour of the one before lengthens its range.
    pub(crate) fn push(&mut self, process: usize, at: u64, touch: Touch) {
        match self.ranges.last_mut() {
            Some(last)
                if (last.process, last.touch) == (process, touch)
                    && last.start + last.pages * PAGE == at =>
            {
                last.pages += 1;
            }
            _ => self.ranges.push(Range {
                process,
                start: at,
                pages: 1,
                touch,
            }),
        }
    }

    /// The pages of one kind: process and address.
    pub(crate) fn pages(&self, touch: Touch) -> impl Iterator<Item = (usize, u64)> {
        let ranges = self.ranges.iter().filter(move |range| range.touch == touch);
        ranges.flat_map(|range| {
            let pages = (0..range.pages).map(|page| range.start + page * PAGE);
            pages.map(|at| (range.process, at))
        })
    }

    /// Pages of all kinds.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.ranges.iter().map(|range| range.pages).sum()
    }
}

/// How far a recording has come.
#[derive(Debug, Clone)]
pub(crate) struct Rounds {
    pub done: usize,
    pub stable: bool,
    pub drift: Option<Drift>,
    /// Rounds until it rests.
    left: usize,
    /// Tenancies since the last look at one.
    passed: usize,
}

impl Default for Rounds {
    fn default() -> Self {
        Self {
            done: 0,
            stable: false,
            drift: None,
            left: MOST_ROUNDS,
            passed: 0,
        }
    }
}

impl Rounds {
    /// Where an earlier recording had come to.
    pub fn of(recorded: &Recorded) -> Self {
        Self {
            done: recorded.rounds,
            stable: recorded.stable,
            drift: recorded.drift,
            left: MOST_ROUNDS.saturating_sub(recorded.rounds),
            passed: 0,
        }
    }

    fn rests(&self) -> bool {
        self.stable || self.left == 0
    }

    /// Whether the tenancy that ends now is to be looked at.
    pub fn look(&mut self) -> bool {
        self.passed += 1;
        !self.rests() || self.passed >= LOOK
    }

    /// Notes how a tenancy differed; `true` when its pages are to be recorded. It agrees with what was
    /// known if it touched at most one page outside for each `agreeing` of these.
    pub fn note(&mut self, drift: Drift, agreeing: usize) -> bool {
        self.passed = 0;
        if drift.known == 0 && drift.outside == 0 {
            return false;
        }
        self.drift = Some(drift);
        if self.rests() {
            if drift.outside * CHANGED <= drift.known {
                return false;
            }
            self.left = MOST_ROUNDS;
        }
        self.done += 1;
        self.left -= 1;
        self.stable = drift.outside * agreeing <= drift.known;
        true
    }

    /// The head of what is told about it.
    pub fn recorded(&self, input: &str, first_use: bool) -> Recorded {
        Recorded {
            input: input.to_owned(),
            rounds: self.done,
            stable: self.stable,
            drift: self.drift,
            first_use,
            ranges: Vec::new(),
        }
    }
}

/// Something for each input of a template.
#[derive(Debug, Default)]
pub(crate) struct Inputs<T>(BTreeMap<String, T>);

impl<T: Default> Inputs<T> {
    fn name<'a>(&self, input: &'a str) -> &'a str {
        // There is always room for the one without a name.
        let named = self.0.keys().filter(|known| !known.is_empty()).count();
        match self.0.contains_key(input) || named + 1 < MOST_INPUTS {
            true => input,
            false => "",
        }
    }

    pub fn get(&self, input: &str) -> Option<&T> {
        self.0.get(self.name(input))
    }

    pub fn entry(&mut self, input: &str) -> &mut T {
        self.0.entry(self.name(input).to_owned()).or_default()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0.iter().map(|(input, one)| (input.as_str(), one))
    }

    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.values_mut()
    }

    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.values()
    }
}

/// Where the shim keeps them.
#[must_use]
pub fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("working-sets")
}

/// The recordings of a template's generation that were kept in a directory, by start method.
///
/// # Errors
/// When a file is there and cannot be read.
pub fn all(
    directory: &Path,
    template: &TemplateId,
    generation: u64,
) -> io::Result<Vec<(Method, Vec<Recorded>)>> {
    let mut all = Vec::new();
    for method in Method::each() {
        let recorded = load(directory, template, generation, method)?;
        if !recorded.is_empty() {
            all.push((method, recorded));
        }
    }
    Ok(all)
}

/// What was kept by [`save`]; nothing where nothing was.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn load(
    directory: &Path,
    template: &TemplateId,
    generation: u64,
    method: Method,
) -> io::Result<Vec<Recorded>> {
    match std::fs::read(path(directory, template, generation, method)) {
        Ok(text) => serde_json::from_slice(&text).map_err(io::Error::other),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(err) => Err(err),
    }
}

/// Keeps recordings, in place of those before. A crash leaves the one or the other.
///
/// # Errors
/// When the file cannot be written.
pub fn save(
    directory: &Path,
    template: &TemplateId,
    generation: u64,
    method: Method,
    recorded: &[Recorded],
) -> io::Result<()> {
    let path = path(directory, template, generation, method);
    let new = path.with_extension("new");
    std::fs::create_dir_all(directory)?;
    std::fs::write(&new, serde_json::to_vec(recorded)?)?;
    std::fs::rename(new, path)
}

/// Removes what was kept of a template, of generations before the given one; of all with none.
///
/// # Errors
/// When the directory cannot be read or changed.
pub fn remove(directory: &Path, template: &TemplateId, before: Option<u64>) -> io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(err) => return Err(err),
    };
    let prefix = format!("{template}-");
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        let generation = rest.and_then(|rest| rest.split('-').next()?.parse::<u64>().ok());
        if generation.is_some_and(|its| before.is_none_or(|before| its < before)) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn path(directory: &Path, template: &TemplateId, generation: u64, method: Method) -> PathBuf {
    directory.join(format!("{template}-{generation}-{method}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drift(known: usize, outside: usize) -> Drift {
        Drift {
            known,
            outside,
            unchanged: None,
        }
    }

    #[test]
    fn a_round_that_agrees_makes_a_recording_stable() {
        let mut rounds = Rounds::default();
        assert!(!rounds.note(drift(0, 0), 64), "nothing was touched");
        assert!(rounds.look() && rounds.note(drift(0, 128), 64));
        assert!(rounds.look() && rounds.note(drift(128, 3), 64));
        assert!(!rounds.stable, "three of 128 are too many");
        assert!(rounds.look() && rounds.note(drift(131, 2), 64));
        assert!(rounds.stable);
        assert_eq!(rounds.done, 3);
    }

    #[test]
    fn one_that_never_agrees_rests() {
        let mut rounds = Rounds::default();
        for round in 0..MOST_ROUNDS {
            assert!(rounds.look() && rounds.note(drift(round * 8 + 1, 8), 64));
        }
        assert!(!rounds.look() && !rounds.stable);
    }

    #[test]
    fn a_change_of_the_input_is_seen_and_recorded() {
        let mut rounds = Rounds::default();
        rounds.note(drift(0, 100), 64);
        rounds.note(drift(100, 0), 64);
        assert!(rounds.stable);
        assert_eq!((1..LOOK).filter(|_| rounds.look()).count(), 0);
        assert!(rounds.look());
        assert!(!rounds.note(drift(100, 20), 64), "some drift is usual");
        assert_eq!(rounds.drift, Some(drift(100, 20)));
        assert!(rounds.stable);
        assert!(rounds.note(drift(100, 60), 64));
        assert!(!rounds.stable && rounds.look());
    }

    #[test]
    fn inputs_beyond_the_most_share_the_one_without_a_name() {
        let mut inputs = Inputs::<usize>::default();
        for index in 0..100 {
            *inputs.entry(&index.to_string()) += 1;
        }
        assert_eq!(inputs.iter().count(), MOST_INPUTS);
        assert_eq!(inputs.get("3"), Some(&1));
        assert_eq!(inputs.get("77"), Some(&(100 - MOST_INPUTS + 1)));
    }

    #[test]
    fn recordings_are_kept_until_their_template_goes() -> io::Result<()> {
        let directory = tempfile::tempdir()?;
        let directory = directory.path().join("sets");
        let template = TemplateId::of("a");
        let mut recorded = Rounds::default().recorded("big", true);
        for page in [4, 5, 1] {
            recorded.push(0, page * PAGE, Touch::Used);
        }
        assert_eq!(recorded.ranges.len(), 2);
        for generation in [1, 2] {
            let all = std::slice::from_ref(&recorded);
            save(&directory, &template, generation, Method::Reap, all)?;
        }
        remove(&directory, &template, Some(2))?;
        assert_eq!(all(&directory, &template, 1)?, []);
        assert_eq!(
            all(&directory, &template, 2)?,
            [(Method::Reap, vec![recorded])]
        );
        remove(&directory, &template, None)?;
        assert_eq!(all(&directory, &template, 2)?, []);
        Ok(())
    }
}

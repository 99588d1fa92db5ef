//! What functions say.
//!
//! Every sandbox writes to a file of its own, which holds the output of its present tenancy only.
//! When the tenancy ends, its last lines go to the function's history, and the file is emptied. Both
//! are bounded, since they may lie in memory.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::instances::SandboxRef;

/// The most that is kept of one tenancy, and read of a file.
const MAX_SECTION: u64 = 256 << 10;
/// A running tenancy's file is emptied when it is larger.
const MAX_LIVE: u64 = 4 << 20;
/// A history is halved when it is larger.
const MAX_HISTORY: u64 = 1 << 20;

/// One line, as clients get it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    pub name: String,
    pub namespace: String,
    pub instance: String,
    /// Seconds since 1970 when the line's tenancy last wrote, or when it was followed.
    #[serde(skip)]
    pub seconds: u64,
    pub timestamp: String,
    pub text: String,
}

/// The output of all sandboxes and functions.
#[derive(Debug, Clone)]
pub struct Logs {
    directory: PathBuf,
}

impl Logs {
    /// Logs below `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// The file that a sandbox writes to.
    pub fn live(&self, sandbox: &SandboxRef) -> PathBuf {
        let file = format!("{}.log", sandbox.id);
        self.directory.join(&sandbox.namespace).join(file)
    }

    fn history(&self, namespace: &str, function: &str) -> PathBuf {
        let file = format!("{function}.history");
        self.directory.join(namespace).join(file)
    }

    /// Moves the end of a tenancy's output to its function's history.
    pub fn end_tenancy(&self, sandbox: &SandboxRef, function: &str) {
        if let Err(err) = self.archive(sandbox, function) {
            tracing::warn!("The output of {} was lost: {err}", sandbox.id);
        }
    }

    /// Removes a sandbox's file; its tenancy, if any, has ended.
    pub fn remove(&self, sandbox: &SandboxRef) {
        // It may never have written.
        let _ = fs::remove_file(self.live(sandbox));
    }

    /// Removes what is kept of a function.
    pub fn forget(&self, namespace: &str, function: &str) {
        let _ = fs::remove_file(self.history(namespace, function));
    }

    /// Bounds the file of a running tenancy.
    pub fn bound(&self, sandbox: &SandboxRef, function: &str) {
        let large = fs::metadata(self.live(sandbox)).is_ok_and(|m| m.len() > MAX_LIVE);
        if large {
            self.end_tenancy(sandbox, function);
        }
    }

    fn archive(&self, sandbox: &SandboxRef, function: &str) -> std::io::Result<()> {
        let live = self.live(sandbox);
        let Ok(mut file) = OpenOptions::new().read(true).write(true).open(&live) else {
            return Ok(());
        };
        if file.metadata()?.len() == 0 {
            return Ok(());
        }
        let lines = lines_of(&mut file, &sandbox.namespace, function, &sandbox.id)?;
        // Whoever writes there appends, so it goes on at the beginning.
        file.set_len(0)?;
        if lines.is_empty() {
            return Ok(());
        }
        let path = self.history(&sandbox.namespace, function);
        let mut history = OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(&path)?;
        let mut text = String::new();
        for line in &lines {
            text.push_str(&serde_json::to_string(line)?);
            text.push('\n');
        }
        history.write_all(text.as_bytes())?;
        if history.metadata()?.len() > MAX_HISTORY {
            halve(&path)?;
        }
        Ok(())
    }

    /// The lines of ended tenancies of a function.
    pub fn past(&self, namespace: &str, function: &str) -> Vec<Line> {
        let text = fs::read_to_string(self.history(namespace, function)).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str::<Line>(line).ok())
            .map(|line| Line {
                seconds: crate::time::parse_rfc3339(&line.timestamp).unwrap_or(0),
                ..line
            })
            .collect()
    }

    /// The lines of a running tenancy.
    pub fn present(&self, sandbox: &SandboxRef, function: &str) -> Vec<Line> {
        let opened = File::open(self.live(sandbox));
        opened
            .and_then(|mut file| lines_of(&mut file, &sandbox.namespace, function, &sandbox.id))
            .unwrap_or_default()
    }

    /// The last words of a sandbox, in one line.
    pub fn last_words(&self, sandbox: &SandboxRef) -> Option<String> {
        let lines = self.present(sandbox, "");
        let from = lines.len().saturating_sub(5);
        let texts: Vec<&str> = lines[from..].iter().map(|l| l.text.trim()).collect();
        let text = texts.join(" | ");
        let cut = text.char_indices().rev().nth(600).map_or(0, |(at, _)| at);
        (!text.is_empty()).then(|| text[cut..].to_owned())
    }
}

fn lines_of(
    file: &mut File,
    namespace: &str,
    function: &str,
    instance: &str,
) -> std::io::Result<Vec<Line>> {
    let metadata = file.metadata()?;
    let seconds = metadata
        .modified()
        .unwrap_or(SystemTime::UNIX_EPOCH)
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let from = metadata.len().saturating_sub(MAX_SECTION);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(MAX_SECTION).read_to_end(&mut bytes)?;
    Ok(split(&bytes, seconds, namespace, function, instance))
}

/// Bytes into lines.
pub fn split(
    bytes: &[u8],
    seconds: u64,
    namespace: &str,
    function: &str,
    instance: &str,
) -> Vec<Line> {
    let text = String::from_utf8_lossy(bytes);
    text.lines()
        .map(|line| Line {
            name: function.to_owned(),
            namespace: namespace.to_owned(),
            instance: instance.to_owned(),
            seconds,
            timestamp: crate::time::rfc3339(seconds),
            text: line.to_owned(),
        })
        .collect()
}

/// Keeps the second half of a history, from a whole line on.
fn halve(path: &Path) -> std::io::Result<()> {
    let text = fs::read_to_string(path)?;
    let mut middle = text.len() / 2;
    while !text.is_char_boundary(middle) {
        middle += 1;
    }
    let from = text[middle..]
        .find('\n')
        .map_or(text.len(), |at| middle + at + 1);
    let partial = path.with_extension("partial");
    fs::write(&partial, &text[from..])?;
    fs::rename(partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(id: &str) -> SandboxRef {
        SandboxRef {
            namespace: "ns".into(),
            id: id.into(),
        }
    }

    fn logs() -> (tempfile::TempDir, Logs) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("ns")).unwrap();
        let logs = Logs::new(dir.path().into());
        (dir, logs)
    }

    #[test]
    fn a_tenancy_leaves_its_lines_to_its_function_only() {
        let (_dir, logs) = logs();
        let one = sandbox("one");
        fs::write(logs.live(&one), "first\nsecond\n").unwrap();
        assert_eq!(logs.present(&one, "a").len(), 2);
        logs.end_tenancy(&one, "a");
        assert!(logs.present(&one, "b").is_empty());
        fs::write(logs.live(&one), "other\n").unwrap();
        logs.end_tenancy(&one, "b");
        logs.remove(&one);
        let texts: Vec<String> = logs.past("ns", "a").into_iter().map(|l| l.text).collect();
        assert_eq!(texts, ["first", "second"]);
        assert_eq!(logs.past("ns", "b").len(), 1);
        logs.forget("ns", "a");
        assert!(logs.past("ns", "a").is_empty());
    }

    #[test]
    fn files_stay_small() {
        let (_dir, logs) = logs();
        let one = sandbox("one");
        for _ in 0..10 {
            fs::write(logs.live(&one), "a line of output\n".repeat(400_000)).unwrap();
            logs.bound(&one, "a");
            assert_eq!(fs::metadata(logs.live(&one)).unwrap().len(), 0);
        }
        assert!(fs::metadata(logs.history("ns", "a")).unwrap().len() < 3 * MAX_HISTORY);
        assert!(!logs.past("ns", "a").is_empty());
    }
}

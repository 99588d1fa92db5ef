//! The other ends of a process's streams, opened from their URIs.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::Owner;
use super::program;
use crate::error::{Result, ShimError};

/// Where output goes.
pub enum Target {
    /// A fifo.
    Stream(Box<dyn AsyncWrite + Send + Unpin>),
    /// A logging program, and what tells its keeper that this stream has ended: the drop.
    Program {
        pipe: pipe::Sender,
        _alive: mpsc::Sender<()>,
    },
    File(tokio::fs::File),
    Nowhere,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stream(_) => "Stream",
            Self::Program { .. } => "Program",
            Self::File(_) => "File",
            Self::Nowhere => "Nowhere",
        })
    }
}

impl Target {
    /// Writes everything.
    pub async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Stream(stream) => stream.write_all(bytes).await,
            Self::Program { pipe, .. } => pipe.write_all(bytes).await,
            Self::File(file) => {
                file.write_all(bytes).await?;
                // tokio's file buffers: a log must be readable at once.
                file.flush().await
            }
            Self::Nowhere => Ok(()),
        }
    }
}

/// A URI taken apart.
#[derive(Debug, PartialEq, Eq)]
pub enum Location {
    Fifo(PathBuf),
    File(PathBuf),
    Program {
        path: PathBuf,
        arguments: Vec<String>,
    },
}

impl Location {
    /// Understands containerd's stream URIs.
    pub fn parse(uri: &str) -> Result<Self> {
        let Some((scheme, rest)) = uri.split_once("://") else {
            return Ok(Self::Fifo(uri.into()));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(decode(path));
        match scheme {
            "fifo" => Ok(Self::Fifo(path)),
            "file" => Ok(Self::File(path)),
            "binary" => {
                // containerd passes each pair as two arguments, in the order of the names.
                let pairs: BTreeMap<String, String> = query
                    .split('&')
                    .filter(|pair| !pair.is_empty())
                    .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                    .map(|(name, value)| (decode(name), decode(value)))
                    .collect();
                let arguments = pairs
                    .into_iter()
                    .flat_map(|(name, value)| [name, value])
                    .filter(|argument| !argument.is_empty())
                    .collect();
                Ok(Self::Program { path, arguments })
            }
            _ => Err(ShimError::InvalidArgument(format!(
                "The stream {uri:?} has an unknown scheme; use a fifo, file:// or binary://"
            ))),
        }
    }
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = tail
            .get(..2)
            .filter(|_| *first == b'%')
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(if *first == b'+' { b' ' } else { *first });
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Opens the source of standard input.
pub fn open_input(uri: &str) -> Result<pipe::Receiver> {
    match Location::parse(uri)? {
        Location::Fifo(path) => pipe::OpenOptions::new()
            .open_receiver(&path)
            .map_err(ShimError::io(format!("open the fifo {}", path.display()))),
        _ => Err(ShimError::InvalidArgument(format!(
            "Standard input {uri:?} must be a fifo"
        ))),
    }
}

/// Opens the ends of standard output and standard error; one logging program serves both.
pub async fn open_outputs(
    stdout: &str,
    stderr: &str,
    owner: &Owner,
) -> Result<(Option<Target>, Option<Target>)> {
    if let Some(Location::Program { path, arguments }) = parse_some(stdout)? {
        let (out, err) = program::start(&path, &arguments, owner).await?;
        let err = (!stderr.is_empty()).then_some(err);
        return Ok((Some(out), err));
    }
    Ok((open_output(stdout)?, open_output(stderr)?))
}

fn parse_some(uri: &str) -> Result<Option<Location>> {
    if uri.is_empty() {
        Ok(None)
    } else {
        Location::parse(uri).map(Some)
    }
}

fn open_output(uri: &str) -> Result<Option<Target>> {
    match parse_some(uri)? {
        None => Ok(None),
        Some(Location::Fifo(path)) if is_fifo(&path) => {
            // Opened for both ways the fifo never refuses and keeps its bytes until a reader comes.
            let fifo = pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(&path)
                .map_err(ShimError::io(format!("open the fifo {}", path.display())))?;
            Ok(Some(Target::Stream(Box::new(fifo))))
        }
        Some(Location::Fifo(path) | Location::File(path)) => Ok(Some(append(&path)?)),
        Some(Location::Program { .. }) => Err(ShimError::InvalidArgument(
            "A logging program must be named for standard output; it then serves both streams"
                .into(),
        )),
    }
}

fn is_fifo(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo())
}

/// A file that output is appended to. Opened at once, not by another thread: this is on the path of
/// a start, and a hop costs more than the open.
fn append(path: &Path) -> Result<Target> {
    let open = || {
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
    };
    let file = open().or_else(|err| match path.parent() {
        Some(directory) if err.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(directory)?;
            open()
        }
        _ => Err(err),
    });
    file.map(|file| Target::File(tokio::fs::File::from_std(file)))
        .map_err(ShimError::io(format!("open {} for output", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_understood() {
        assert_eq!(
            Location::parse("/a/b").unwrap(),
            Location::Fifo("/a/b".into())
        );
        assert_eq!(
            Location::parse("file:///a%20b").unwrap(),
            Location::File("/a b".into())
        );
        assert_eq!(
            Location::parse("binary:///bin/log?b=2&a=1").unwrap(),
            Location::Program {
                path: "/bin/log".into(),
                arguments: ["a", "1", "b", "2"].map(String::from).to_vec()
            }
        );
        assert!(Location::parse("tcp://x").is_err());
    }

    #[test]
    fn broken_escapes_are_kept_as_they_are() {
        assert_eq!(decode("%zz%4"), "%zz%4");
    }
}

//! CRIU's images on disk: a folder for each template and generation, and folders for what CRIU writes
//! while it runs.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use trenv_pool::TemplateId;

use super::{CriuError, io_error};

/// What is known of the tree beside CRIU's own files.
const DESCRIPTION: &str = "tree.json";
/// How folders that are no image begin.
const UNFINISHED: &str = "new-";
const WORK: &str = "work-";

static NEXT: AtomicU64 = AtomicU64::new(0);

/// The folder with the images of all templates.
#[derive(Debug, Clone)]
pub struct Images {
    directory: PathBuf,
}

impl Images {
    /// Those of the state directory.
    #[must_use]
    pub fn in_state(state_dir: &Path) -> Self {
        Self {
            directory: state_dir.join("criu"),
        }
    }

    /// Where the image of a template's generation is, if there is one.
    pub(super) fn of(&self, template: &TemplateId, generation: u64) -> PathBuf {
        self.directory.join(format!("{template}-{generation}"))
    }

    /// A folder for an image that is to be written.
    pub(super) fn begin(&self) -> Result<Image, CriuError> {
        Ok(Image {
            images: self.clone(),
            path: Some(self.make(UNFINISHED)?),
        })
    }

    /// A folder for one run of CRIU.
    pub(super) fn work(&self) -> Result<Work, CriuError> {
        Ok(Work(self.make(WORK)?))
    }

    fn make(&self, kind: &str) -> Result<PathBuf, CriuError> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self
            .directory
            .join(format!("{kind}{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path)
            .map_err(io_error(format!("making the folder {}", path.display())))?;
        Ok(path)
    }

    /// Removes the images of a template, of generations before the given one; of all with none.
    ///
    /// # Errors
    /// When a folder cannot be read or removed.
    pub fn remove(&self, template: &TemplateId, before: Option<u64>) -> Result<(), CriuError> {
        let prefix = format!("{template}-");
        self.remove_where(|name| {
            let generation = name.strip_prefix(&prefix);
            let generation = generation.and_then(|rest| rest.parse::<u64>().ok());
            generation.is_some_and(|its| before.is_none_or(|before| its < before))
        })
    }

    /// Removes what processes have left that ended while they ran CRIU.
    ///
    /// # Errors
    /// As [`Images::remove`].
    pub fn sweep(&self) -> Result<(), CriuError> {
        self.remove_where(|name| {
            let owned = name.strip_prefix(UNFINISHED).or(name.strip_prefix(WORK));
            let owner = owned.and_then(|rest| rest.split('-').next());
            owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
        })
    }

    fn remove_where(&self, which: impl Fn(&str) -> bool) -> Result<(), CriuError> {
        let failed = |source| io_error(format!("clearing {}", self.directory.display()))(source);
        let entries = match std::fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(err) => return Err(failed(err)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_str().is_some_and(&which) {
                std::fs::remove_dir_all(entry.path()).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// An image that is not a template's yet. Dropping it removes it.
#[derive(Debug)]
pub struct Image {
    images: Images,
    path: Option<PathBuf>,
}

impl Image {
    pub(super) fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    pub(super) fn describe(&self, streams: &Streams) -> Result<(), CriuError> {
        let path = self.path().join(DESCRIPTION);
        serde_json::to_vec(streams)
            .map_err(std::io::Error::from)
            .and_then(|bytes| std::fs::write(&path, bytes))
            .map_err(io_error(format!("writing {}", path.display())))
    }

    /// Makes it the image of a template.
    ///
    /// # Errors
    /// When the folder cannot be moved.
    pub fn keep(mut self, template: &TemplateId, generation: u64) -> Result<(), CriuError> {
        let place = self.images.of(template, generation);
        std::fs::rename(self.path(), &place)
            .map_err(io_error(format!("moving an image to {}", place.display())))?;
        self.path = None;
        Ok(())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            remove(path);
        }
    }
}

/// A folder for one run of CRIU, which goes with this.
#[derive(Debug)]
pub struct Work(PathBuf);

impl Work {
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(folder: &Path) {
    if let Err(err) = std::fs::remove_dir_all(folder) {
        tracing::warn!("{} stays until the next sweep: {err}", folder.display());
    }
}

/// The root of a dumped tree and its standard streams, which the new tenancy's take the place of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streams {
    pub root_pid: i32,
    /// What CRIU calls those that come from outside of the sandbox.
    pub names: [Option<String>; 3],
}

impl Streams {
    pub fn of(root: i32, root_pid: i32) -> Result<Self, CriuError> {
        let looking = || io_error("looking at the function's streams");
        let mounts = std::fs::read_to_string(format!("/proc/{root}/mountinfo"));
        let mounts = mounts.map_err(looking())?;
        let mut names = [None, None, None];
        for (number, name) in names.iter_mut().enumerate() {
            let path = format!("/proc/{root}/fd/{number}");
            match std::fs::read_link(&path) {
                Ok(link) if link.to_string_lossy().starts_with("pipe:") => {
                    *name = Some(link.to_string_lossy().into_owned());
                }
                Ok(_) => {
                    let inode = std::fs::metadata(&path).map_err(looking())?.ino();
                    let info = std::fs::read_to_string(format!("/proc/{root}/fdinfo/{number}"));
                    *name = foreign_file(&info.map_err(looking())?, &mounts, inode);
                }
                // It has closed it.
                Err(err) if err.kind() == std::io::ErrorKind::NotFound => {}
                Err(err) => return Err(looking()(err)),
            }
        }
        Ok(Self { root_pid, names })
    }

    /// Reads the description of an image.
    pub fn read(image: &Path) -> Result<Self, CriuError> {
        let bytes = match std::fs::read(image.join(DESCRIPTION)) {
            Ok(bytes) => bytes,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
                let name = image.file_name().unwrap_or_default();
                return Err(CriuError::NoImage {
                    image: name.to_string_lossy().into_owned(),
                });
            }
            Err(err) => return Err(io_error("reading an image's description")(err)),
        };
        serde_json::from_slice(&bytes).map_err(|err| CriuError::BadImage {
            path: image.to_owned(),
            reason: err.to_string(),
        })
    }

    /// Number and name of each, the first number of what several have.
    pub fn each(&self) -> impl Iterator<Item = (i32, &str)> {
        let named = (0..).zip(&self.names);
        named.filter_map(|(number, name)| {
            let name = name.as_deref()?;
            let first = self
                .names
                .iter()
                .position(|one| one.as_deref() == Some(name));
            (first == usize::try_from(number).ok()).then_some((number, name))
        })
    }

    /// Those that are files of another mount namespace.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let names = self.each().map(|(_, name)| name);
        names.filter(|name| name.starts_with("file["))
    }
}

/// CRIU's name of an open file, if its mount is not among those of the function.
fn foreign_file(info: &str, mounts: &str, inode: u64) -> Option<String> {
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    let mount: u32 = mount.trim().parse().ok()?;
    let id = mount.to_string();
    let own = mounts
        .lines()
        .any(|line| line.split(' ').next() == Some(&id));
    (!own).then(|| format!("file[{mount:x}:{inode:x}]"))
}

/// A process's pid in the innermost of its pid namespaces.
pub fn pid_inside(pid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().next_back()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> TemplateId {
        TemplateId::of("a function")
    }

    #[test]
    fn an_image_is_found_once_it_is_kept() {
        let state = tempfile::tempdir().unwrap();
        let images = Images::in_state(state.path());
        let streams = Streams {
            root_pid: 2,
            names: [Some("pipe:[1]".into()), None, None],
        };
        let image = images.begin().unwrap();
        image.describe(&streams).unwrap();
        let place = images.of(&id(), 4);
        assert!(matches!(
            Streams::read(&place),
            Err(CriuError::NoImage { .. })
        ));
        image.keep(&id(), 4).unwrap();
        assert_eq!(Streams::read(&place).unwrap(), streams);
        std::fs::write(place.join(DESCRIPTION), "{}").unwrap();
        assert!(matches!(
            Streams::read(&place),
            Err(CriuError::BadImage { .. })
        ));
    }

    #[test]
    fn images_go_with_their_generation_and_what_was_left_with_its_process() {
        let state = tempfile::tempdir().unwrap();
        let images = Images::in_state(state.path());
        for generation in [3, 4] {
            images.begin().unwrap().keep(&id(), generation).unwrap();
        }
        images.remove(&id(), Some(4)).unwrap();
        assert!(!images.of(&id(), 3).exists() && images.of(&id(), 4).exists());
        let own = images.work().unwrap();
        let left = images.directory.join("work-4194305-0");
        std::fs::create_dir(&left).unwrap();
        images.sweep().unwrap();
        assert!(own.path().exists() && !left.exists() && images.of(&id(), 4).exists());
        images.remove(&id(), None).unwrap();
        assert!(!images.of(&id(), 4).exists());
    }

    #[test]
    fn an_image_that_is_not_kept_is_removed() {
        let state = tempfile::tempdir().unwrap();
        let images = Images::in_state(state.path());
        let image = images.begin().unwrap();
        let path = image.path().to_owned();
        assert!(path.exists());
        drop(image);
        assert!(!path.exists());
    }

    #[test]
    fn a_stream_from_another_mount_namespace_is_known_by_mount_and_inode() {
        let mounts =
            "221 90 0:30 / / rw - overlay overlay rw\n225 221 0:40 / /dev rw - tmpfs t rw\n";
        let name = foreign_file(
            "pos:\t0\nflags:\t0100000\nmnt_id:\t22\nino:\t5\n",
            mounts,
            31,
        );
        assert_eq!(name.as_deref(), Some("file[16:1f]"));
        assert_eq!(foreign_file("mnt_id:\t225\n", mounts, 31), None);
    }

    #[test]
    fn the_streams_of_a_process_are_named() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        let streams = Streams::of(pid, pid).unwrap();
        let input = streams.names[0].as_deref().unwrap();
        assert!(input.starts_with("pipe:["), "{input}");
        // The test's own mount namespace.
        assert_eq!(streams.names[1], None);
        assert_eq!(pid_inside(pid), Some(pid));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

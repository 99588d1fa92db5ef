//! The process of a function: what the image asks for, changed by what the deployment asks for.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use serde::{Deserialize, Serialize};

use super::deployment::Deployment;
use crate::containerd::{ImageConfig, Mount};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The largest user database that is read.
const MAX_DATABASE: u64 = 1 << 20;

/// A process, ready to be written into a spec.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Process {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// Why no process can be made of image and deployment.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProcessError {
    #[error("The image {0} has neither an entrypoint nor a command; build it with one")]
    NoCommand(String),
    #[error(
        "The image's user {user:?} is not in its {database}; build the image with a numeric user or with an entry for it"
    )]
    UnknownUser {
        user: String,
        database: &'static str,
    },
}

impl Process {
    /// Makes the process of `deployment` on an image whose file system is at `mounts`.
    ///
    /// # Errors
    /// When the image has no command, or its user cannot be found.
    pub fn build(
        deployment: &Deployment,
        image: &ImageConfig,
        mounts: &[Mount],
    ) -> Result<Self, ProcessError> {
        let args: Vec<String> = image.entrypoint.iter().chain(&image.cmd).cloned().collect();
        if args.is_empty() {
            return Err(ProcessError::NoCommand(deployment.image.clone()));
        }
        let (uid, gid, groups) = Users::new(mounts).find(&image.user)?;
        Ok(Self {
            args,
            env: environment(deployment, &image.env),
            cwd: match image.working_dir.as_str() {
                "" => "/".to_owned(),
                dir => dir.to_owned(),
            },
            uid,
            gid,
            groups,
        })
    }
}

/// The image's environment, with the deployment's over it. `envProcess` is the watchdog's
/// `fprocess`.
fn environment(deployment: &Deployment, image: &[String]) -> Vec<String> {
    let mut env: Vec<String> = Vec::with_capacity(image.len() + 2);
    let mut set = |entry: String| {
        let name = entry.split('=').next().unwrap_or_default().to_owned() + "=";
        match env.iter_mut().find(|e| e.starts_with(&name)) {
            Some(old) => *old = entry,
            None => env.push(entry),
        }
    };
    set(DEFAULT_PATH.to_owned());
    for entry in image {
        set(entry.clone());
    }
    if !deployment.env_process.is_empty() {
        set(format!("fprocess={}", deployment.env_process));
    }
    for (name, value) in &deployment.env_vars {
        set(format!("{name}={value}"));
    }
    env
}

/// The user databases of an image, read from its layers' directories. Reading there needs no
/// mount, so nothing can be left behind.
struct Users {
    layers: Vec<String>,
}

impl Users {
    fn new(mounts: &[Mount]) -> Self {
        let mut layers = Vec::new();
        for mount in mounts {
            if mount.kind == "overlay" {
                for option in &mount.options {
                    if let Some(upper) = option.strip_prefix("upperdir=") {
                        layers.insert(0, upper.to_owned());
                    } else if let Some(lower) = option.strip_prefix("lowerdir=") {
                        layers.extend(lower.split(':').map(str::to_owned));
                    }
                }
            } else {
                layers.push(mount.source.clone());
            }
        }
        Self { layers }
    }

    /// Resolves `USER`, `USER:GROUP`, and numbers in place of either.
    fn find(&self, user: &str) -> Result<(u32, u32, Vec<u32>), ProcessError> {
        if user.is_empty() {
            return Ok((0, 0, Vec::new()));
        }
        let (name, group) = match user.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (user, None),
        };
        let passwd = self.read("etc/passwd");
        let by_number = name.parse::<u32>().ok();
        let entry = passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let (uid, gid) = (fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?);
            let wanted = fields.first() == Some(&name) || by_number == Some(uid);
            wanted.then(|| ((*fields.first().unwrap_or(&"")).to_owned(), uid, gid))
        });
        let (account, uid, primary) = match (entry, by_number) {
            (Some((account, uid, gid)), _) => (account, uid, gid),
            (None, Some(uid)) => (String::new(), uid, 0),
            (None, None) => {
                return Err(ProcessError::UnknownUser {
                    user: name.to_owned(),
                    database: "/etc/passwd",
                });
            }
        };
        let groups = self.read("etc/group");
        let mut additional = Vec::new();
        let mut named = None;
        for line in groups.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            let Some(gid) = fields.get(2).and_then(|f| f.parse::<u32>().ok()) else {
                continue;
            };
            if group.is_some() && fields.first().copied() == group {
                named = Some(gid);
            }
            let member = fields.get(3).is_some_and(|m| {
                m.split(',')
                    .any(|one| !account.is_empty() && one == account)
            });
            if member {
                additional.push(gid);
            }
        }
        match group {
            None => Ok((uid, primary, additional)),
            // A group that is asked for replaces the account's groups, as in containerd.
            Some(group) => match group.parse::<u32>().ok().or(named) {
                Some(gid) => Ok((uid, gid, Vec::new())),
                None => Err(ProcessError::UnknownUser {
                    user: user.to_owned(),
                    database: "/etc/group",
                }),
            },
        }
    }

    /// The topmost layer's file; empty when no layer has one. Links stay inside the layer.
    fn read(&self, path: &str) -> String {
        for layer in &self.layers {
            let Ok(root) = File::open(layer) else {
                continue;
            };
            let how = OpenHow::new()
                .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
                .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
            let Ok(fd) = openat2(root.as_fd(), Path::new(path), how) else {
                continue;
            };
            let file = File::from(fd);
            if !file.metadata().is_ok_and(|m| m.is_file()) {
                return String::new();
            }
            let mut bytes = Vec::new();
            if file.take(MAX_DATABASE).read_to_end(&mut bytes).is_ok() {
                return String::from_utf8_lossy(&bytes).into_owned();
            }
        }
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image_root() -> (tempfile::TempDir, Vec<Mount>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(
            dir.path().join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\napp:x:100:101::/home/app:/bin/sh\n",
        )
        .unwrap();
        std::fs::write(
            dir.path().join("etc/group"),
            "root:x:0:\nstaff:x:50:app,other\nwheel:x:10:other\n",
        )
        .unwrap();
        let mount = Mount {
            kind: "bind".into(),
            source: dir.path().display().to_string(),
            ..Default::default()
        };
        (dir, vec![mount])
    }

    #[test]
    fn users_are_looked_up_in_the_image() {
        let (_dir, mounts) = image_root();
        let users = Users::new(&mounts);
        assert_eq!(users.find("").unwrap(), (0, 0, vec![]));
        assert_eq!(users.find("app").unwrap(), (100, 101, vec![50]));
        assert_eq!(users.find("100").unwrap(), (100, 101, vec![50]));
        assert_eq!(users.find("app:wheel").unwrap(), (100, 10, vec![]));
        assert_eq!(users.find("7:8").unwrap(), (7, 8, vec![]));
        assert_eq!(users.find("4242").unwrap(), (4242, 0, vec![]));
        assert!(users.find("nobody-here").is_err());
        assert!(users.find("app:none").is_err());
    }

    #[test]
    fn links_in_an_image_do_not_lead_out_of_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("etc/passwd")).unwrap();
        let mounts = vec![Mount {
            kind: "bind".into(),
            source: dir.path().display().to_string(),
            ..Default::default()
        }];
        assert!(Users::new(&mounts).find("root").is_err());
    }

    #[test]
    fn the_deployment_overrides_the_image() {
        let deployment = Deployment {
            env_process: "python3 index.py".into(),
            env_vars: [("MODE".to_owned(), "b".to_owned())].into(),
            ..Default::default()
        };
        let image = ImageConfig {
            entrypoint: vec!["/fwatchdog".into()],
            cmd: vec!["-v".into()],
            env: vec!["PATH=/bin".into(), "MODE=a".into()],
            ..Default::default()
        };
        let process = Process::build(&deployment, &image, &[]).unwrap();
        assert_eq!(process.args, ["/fwatchdog", "-v"]);
        assert_eq!(
            process.env,
            ["PATH=/bin", "MODE=b", "fprocess=python3 index.py"]
        );
        assert_eq!(process.cwd, "/");
    }

    #[test]
    fn an_image_without_a_command_is_refused() {
        let built = Process::build(&Deployment::default(), &ImageConfig::default(), &[]);
        assert!(matches!(built, Err(ProcessError::NoCommand(_))));
    }
}

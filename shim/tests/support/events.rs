//! What `ctr events` tells.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use super::{Containerd, IMAGE};

/// One event.
#[derive(Debug, Clone)]
pub struct Told {
    /// When the shim saw it, as text that sorts as the times do.
    pub at: String,
    /// Without the slash in front.
    pub topic: String,
    pub body: Value,
}

impl Told {
    fn parse(line: &str) -> Option<Self> {
        let (head, body) = line.split_at(line.find('{')?);
        let words: Vec<&str> = head.split_whitespace().collect();
        Some(Self {
            at: words[..2].join(" "),
            topic: words.last()?.strip_prefix('/')?.to_owned(),
            body: serde_json::from_str(body).ok()?,
        })
    }

    fn text(&self, name: &str) -> &str {
        self.body[name].as_str().unwrap_or_default()
    }

    /// The process's id and the status, where there are any: "tasks/exit e1 137".
    pub fn short(&self) -> String {
        let process = match self.topic.as_str() {
            "tasks/exit" => self.text("id"),
            topic if topic.starts_with("tasks/exec") => self.text("exec_id"),
            _ => "",
        };
        let status = match self.topic.as_str() {
            "tasks/exit" => self.body["exit_status"].as_u64().unwrap_or(0).to_string(),
            _ => String::new(),
        };
        [self.topic.as_str(), process, &status]
            .into_iter()
            .filter(|word| !word.is_empty())
            .collect::<Vec<_>>()
            .join(" ")
    }
}

/// `ctr events`, from [`Events::follow`] on.
pub struct Events {
    child: Child,
    path: PathBuf,
}

impl Events {
    /// Returns when containerd tells this one for certain.
    pub fn follow(containerd: &Containerd) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = containerd.path(&format!("events-{number}"));
        let mut command = containerd.command(&["events"]);
        let child = command
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&path).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let this = Self { child, path };
        containerd.until("events are told", || {
            containerd.ctr(&["image", "label", IMAGE, &format!("follower={number}")]);
            this.all().iter().any(|told| told.topic == "images/update")
        });
        this
    }

    pub fn all(&self) -> Vec<Told> {
        let text = std::fs::read_to_string(&self.path).unwrap();
        text.lines().filter_map(Told::parse).collect()
    }

    /// The events of one container, in the order told.
    pub fn of(&self, container: &str) -> Vec<Told> {
        let mut all = self.all();
        all.retain(|told| told.text("container_id") == container);
        all
    }

    /// [`Events::of`], each in short.
    pub fn short(&self, container: &str) -> Vec<String> {
        self.of(container).iter().map(Told::short).collect()
    }

    /// Whether a container's event of this topic has been told.
    pub fn has(&self, container: &str, topic: &str) -> bool {
        self.of(container).iter().any(|told| told.topic == topic)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // `timeout` ends with its child, not the other way round.
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

impl Containerd {
    /// Starts containerd again with its door for events closed: what shims have waiting comes only
    /// after [`Containerd::let_events_in`], so that a follower can be there first.
    pub fn launch_without_events(&mut self) {
        let path = self.path("config.toml");
        let config = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, config.replace("c.sock.ttrpc", "held.sock.ttrpc")).unwrap();
        let _ = std::fs::remove_file(self.path("c.sock.ttrpc"));
        self.launch();
    }

    pub fn let_events_in(&self) {
        std::os::unix::fs::symlink(self.path("held.sock.ttrpc"), self.path("c.sock.ttrpc"))
            .unwrap();
    }
}

//! Messages between the library, pid 1 and the joiner: one postcard message per packet.
//!
//! Descriptors travel beside a message in the order that its comment names.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::process::ProcessSpec;

/// What the library asks of pid 1.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Descriptors: the root's mount, then the mount of every entry of `parts`.
    Enter(EnterRequest),
    Purge,
}

/// A root to swap in.
#[derive(Debug, Serialize, Deserialize)]
pub struct EnterRequest {
    pub hostname: String,
    pub read_only: bool,
    pub parts: Vec<PartPlace>,
    /// Paths to hide and to make read-only beyond those that always are.
    pub masked: Vec<String>,
    pub readonly: Vec<String>,
}

/// Where a mount goes.
#[derive(Debug, Serialize, Deserialize)]
pub struct PartPlace {
    pub destination: String,
    pub directory: bool,
}

/// What pid 1 answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    Done(Vec<(StepName, Duration)>),
    Failed(String),
}

/// An exit, as pid 1 reports it on its second socket.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ExitReport {
    pub pid: i32,
    /// As wait(2) gives it.
    pub wait_status: i32,
}

/// What the launcher is told. Descriptors: the network namespace.
#[derive(Debug, Serialize, Deserialize)]
pub struct LaunchRequest {
    pub hostname: String,
}

/// What the launcher says before it makes way for pid 1. Descriptors: a pidfd of pid 1.
#[derive(Debug, Serialize, Deserialize)]
pub enum Launched {
    Started,
    Failed(String),
}

/// The joiner's order. Descriptors: pidfd of pid 1, three of stdio, the cgroup's directory if
/// `into_cgroup`.
#[derive(Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    pub process: ProcessSpec,
    pub into_cgroup: bool,
}

/// What the joiner reports. Descriptors with `Started`: a pidfd, and the terminal if one was asked.
#[derive(Debug, Serialize, Deserialize)]
pub enum Joined {
    Started { pid_in_sandbox: i32 },
    Failed(String),
}

macro_rules! step_names {
    ($($variant:ident => $name:literal),+ $(,)?) => {
        /// Names of pid 1's steps; a number on the wire, a static string for the library's callers.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum StepName { $($variant),+ }
        impl StepName {
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }
    };
}

step_names! {
    RootAttach => "root_attach",
    RootParts => "root_parts",
    RootEnter => "root_enter",
    PurgeProcesses => "purge_processes",
    PurgeRoot => "purge_root",
    PurgeIpc => "purge_ipc",
    PurgeNetwork => "purge_network",
    MakeParts => "make_parts",
}

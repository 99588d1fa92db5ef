//! A minute without containerd: tasks go on, and every event is told afterwards, in order.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::TaskClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::containerd;
use support::events::Events;
use support::service::limit;
use ttrpc::context;

const FOREVER: &str = "while :; do echo tick; sleep 0.2; done";
const OUTAGE: Duration = Duration::from_secs(62);

/// What has happened, by container, as [`support::events::Told::short`] names it.
type Happened = BTreeMap<String, Vec<String>>;

/// The shim's task service, called as containerd would.
#[derive(Clone)]
struct Tasks(TaskClient);

impl Tasks {
    async fn connect(address: &str) -> Self {
        let client = ttrpc::asynchronous::Client::connect(address).await.unwrap();
        Self(TaskClient::new(client))
    }

    /// Adds a process to a container and starts it; answers its pid.
    async fn exec(&self, id: &str, exec_id: &str, script: &str) -> u32 {
        let process = serde_json::json!({
            "args": ["/bin/sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"],
            "user": { "uid": 0, "gid": 0 },
        });
        let request = api::ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            spec: MessageField::some(Any {
                value: process.to_string().into_bytes(),
                ..Any::default()
            }),
            ..api::ExecProcessRequest::default()
        };
        self.0.exec(limit(), &request).await.unwrap();
        self.start(id, exec_id).await
    }

    async fn start(&self, id: &str, exec_id: &str) -> u32 {
        let request = api::StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..api::StartRequest::default()
        };
        self.0.start(limit(), &request).await.unwrap().pid
    }

    async fn wait(&self, id: &str, exec_id: &str) -> u32 {
        let request = api::WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..api::WaitRequest::default()
        };
        let within = context::with_duration(Duration::from_secs(20));
        self.0.wait(within, &request).await.unwrap().exit_status
    }

    async fn delete(&self, id: &str, exec_id: &str) {
        let request = api::DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..api::DeleteRequest::default()
        };
        self.0.delete(limit(), &request).await.unwrap();
    }

    /// Processes that end by themselves and such that are killed by their pids.
    async fn churn(&self, id: &str, round: &str, count: u32) -> Vec<String> {
        let mut happened = Vec::new();
        for number in 0..count {
            let exec_id = format!("{round}-{number}");
            let (script, status) = match number % 3 {
                0 => ("sleep 100".into(), 137),
                _ => (format!("exit {number}"), number),
            };
            let pid = self.exec(id, &exec_id, &script).await;
            if status == 137 {
                kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
            }
            assert_eq!(self.wait(id, &exec_id).await, status, "{id} {exec_id}");
            self.delete(id, &exec_id).await;
            happened.extend([
                format!("tasks/exec-added {exec_id}"),
                format!("tasks/exec-started {exec_id}"),
                format!("tasks/exit {exec_id} {status}"),
            ]);
        }
        happened
    }

    /// The whole life of a sandbox whose bundle is a copy of another's.
    async fn life(&self, id: &str, bundle: &Path, rootfs: &Path, work: &Path) -> Vec<String> {
        std::fs::create_dir_all(work.join("upper")).unwrap();
        std::fs::create_dir_all(work.join("work")).unwrap();
        let request = api::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            rootfs: vec![api::Mount {
                type_: "overlay".into(),
                source: "overlay".into(),
                options: vec![
                    format!("workdir={}", work.join("work").display()),
                    format!("upperdir={}", work.join("upper").display()),
                    format!("lowerdir={}", rootfs.display()),
                ],
                ..api::Mount::default()
            }],
            ..api::CreateTaskRequest::default()
        };
        self.0.create(limit(), &request).await.unwrap();
        self.start(id, "").await;
        assert_eq!(self.wait(id, "").await, 6);
        self.delete(id, "").await;
        ["create", "start", "exit", "delete"]
            .map(|what| match what {
                "exit" => format!("tasks/exit {id} 6"),
                other => format!("tasks/{other}"),
            })
            .to_vec()
    }

    async fn pause_and_resume(&self, id: &str) -> Vec<String> {
        let request = api::PauseRequest {
            id: id.into(),
            ..api::PauseRequest::default()
        };
        self.0.pause(limit(), &request).await.unwrap();
        let request = api::ResumeRequest {
            id: id.into(),
            ..api::ResumeRequest::default()
        };
        self.0.resume(limit(), &request).await.unwrap();
        vec!["tasks/paused".into(), "tasks/resumed".into()]
    }

    /// The pid of the function in a sandbox; the first one of the list is the sandbox's pid 1.
    async fn function_of(&self, id: &str) -> i32 {
        let request = api::PidsRequest {
            id: id.into(),
            ..api::PidsRequest::default()
        };
        let pids = self.0.pids(limit(), &request).await.unwrap().processes;
        pids[1].pid.cast_signed()
    }
}

#[test]
fn a_minute_without_containerd_loses_no_event_and_keeps_their_order() {
    let Some(mut containerd) = containerd("outage") else {
        return;
    };
    let before = Events::follow(&containerd);
    for id in ["a", "b", "victim"] {
        containerd.run_function(id, FOREVER);
    }
    containerd.run_function("ends", "sleep 8; exit 9");
    containerd.run_idle("idle");
    let bundle = containerd.path("copied-bundle");
    std::fs::create_dir(&bundle).unwrap();
    let of_containerd = containerd.path("state/io.containerd.runtime.v2.task/default/ends");
    let spec = std::fs::read_to_string(of_containerd.join("config.json")).unwrap();
    let short = spec.replace("sleep 8; exit 9", "exit 6");
    assert_ne!(spec, short);
    std::fs::write(bundle.join("config.json"), short).unwrap();

    containerd.until("all starts are told", || {
        let ids = ["a", "b", "victim", "ends", "idle"];
        ids.iter().all(|id| before.has(id, "tasks/start"))
    });
    // The shim's queue is empty when the answer to the last one has come back, too.
    std::thread::sleep(Duration::from_millis(200));
    drop(before);
    containerd.stop();
    let begun = Instant::now();
    let address = containerd.shim_address();
    let (rootfs, work) = (containerd.path("rootfs"), containerd.path("copied-work"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let happened: Happened = runtime.block_on(async {
        let tasks = Tasks::connect(&address).await;
        let mut happened = Happened::new();
        for round in ["early", "late"] {
            let (a, b, idle) = tokio::join!(
                tasks.churn("a", round, 20),
                tasks.churn("b", round, 20),
                tasks.life(round, &bundle, &rootfs, &work),
            );
            happened.entry("a".into()).or_default().extend(a);
            happened.entry("b".into()).or_default().extend(b);
            happened.insert(round.into(), idle);
            let paused = tasks.pause_and_resume("b").await;
            happened.entry("b".into()).or_default().extend(paused);
            if round == "early" {
                let victim = tasks.function_of("victim").await;
                kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
                assert_eq!(tasks.wait("victim", "").await, 137);
                assert_eq!(tasks.wait("ends", "").await, 9);
                tokio::time::sleep(OUTAGE.saturating_sub(begun.elapsed())).await;
            }
        }
        happened.insert("victim".into(), vec!["tasks/exit victim 137".into()]);
        happened.insert("ends".into(), vec!["tasks/exit ends 9".into()]);
        happened.insert("idle".into(), vec![]);
        happened
    });
    assert!(begun.elapsed() >= Duration::from_secs(60));

    containerd.launch_without_events();
    let events = Events::follow(&containerd);
    assert!(
        events
            .all()
            .iter()
            .all(|told| !told.topic.starts_with("tasks/"))
    );
    containerd.let_events_in();
    let all = |told: &Happened| -> usize { told.values().map(Vec::len).sum() };
    let told = || -> Happened {
        let ids = happened.keys();
        ids.map(|id| (id.clone(), events.short(id))).collect()
    };
    containerd.until("all events are told", || all(&told()) >= all(&happened));
    // Nothing comes twice either.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(told(), happened);
    for id in happened.keys() {
        let times: Vec<String> = events.of(id).into_iter().map(|told| told.at).collect();
        assert!(times.is_sorted(), "{id}: {times:?}");
    }
    println!(
        "{} events were told after {:?}",
        all(&told()),
        begun.elapsed()
    );

    for id in ["a", "b", "victim", "ends", "idle"] {
        containerd.remove(id);
    }
    containerd.until("later events are told, too", || {
        events.has("a", "tasks/delete") && events.has("ends", "tasks/delete")
    });
    drop(events);
    containerd.assert_clean();
}

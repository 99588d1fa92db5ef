//! Starts that fail in the middle, when the root is entered and processes of the tree are there: the
//! sandbox is given up, nothing of the tenancy is left, and the next start works.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

use support::service::{Service, Template, code, start_request, zygotes};
use support::{Containerd, containerd};
use trenv_sandbox_proto as proto;
use trenv_snapshot::methods::Method;

const PORT: u16 = 8080;

/// A function, and what keeps it from being started again.
struct Case {
    name: &'static str,
    /// What it does first; then it counts.
    setup: &'static str,
    obstacle: Obstacle,
    /// What the error must name.
    named: &'static str,
}

enum Obstacle {
    /// The root of the start lacks a file or folder that the function's root had.
    Missing(Missing),
    /// Somebody listens at the function's port in the sandbox's network.
    PortTaken,
}

enum Missing {
    File(&'static str),
    Folder(&'static str),
}

const CASES: [Case; 4] = [
    Case {
        name: "descriptor",
        setup: "echo x > /data; exec 3< /data",
        obstacle: Obstacle::Missing(Missing::File("data")),
        named: "/data",
    },
    Case {
        name: "child",
        // The root of the tree is whole by then, and so is another child.
        setup: "perl -e 'mkdir \"/held\"'; sleep 9999 & (cd /held; exec sleep 9999) &",
        obstacle: Obstacle::Missing(Missing::Folder("held")),
        named: "/held",
    },
    Case {
        name: "socket",
        setup: "perl -e 'mkdir \"/held\"; socket(S, 1, 1, 0); \
                bind(S, pack(\"Sa108\", 1, \"/held/socket\")) or die; listen(S, 5); sleep 9999' &",
        obstacle: Obstacle::Missing(Missing::Folder("held")),
        named: "/held/socket",
    },
    Case {
        name: "port",
        setup: "perl -e 'socket(S, 2, 1, 0); \
                bind(S, pack(\"Sna4x8\", 2, 8080, \"\\0\" x 4)) or die; listen(S, 5); sleep 9999' &",
        obstacle: Obstacle::PortTaken,
        named: "8080",
    },
];

#[test]
fn a_start_that_fails_in_the_middle_leaves_nothing_and_the_next_one_works() {
    let Some(containerd) = containerd("failed-starts") else {
        return;
    };
    // Keeps the shim while all others come and go.
    containerd.run_idle("keeper");
    let service = Service::connect(&containerd);
    for case in &CASES {
        let template = snapshot(&containerd, &service, case);
        service.prepare(&containerd, &template, &proto::Limits::default());
        fail(&containerd, &service, case, &template, Method::Template);
        succeed(&containerd, &service, case, &template);
        delete(&service, &template);
        containerd.remove(case.name);
    }
    drop(service);
    containerd.remove("keeper");
    containerd.assert_clean();
}

#[test]
fn a_start_by_any_method_leaves_nothing_when_it_fails() {
    let Some(containerd) = containerd("failed-methods") else {
        return;
    };
    containerd.run_idle("keeper");
    let service = Service::connect(&containerd);
    let case = &CASES[0];
    let template = snapshot(&containerd, &service, case);
    for method in Method::ALL {
        fail(&containerd, &service, case, &template, method);
    }
    delete(&service, &template);
    containerd.until("the skeletons have ended", || {
        zygotes(&containerd).is_empty()
    });
    containerd.remove(case.name);
    drop(service);
    containerd.remove("keeper");
    containerd.assert_clean();
}

/// Runs the function of a case cold and takes its snapshot; its sandbox is idle then.
fn snapshot(containerd: &Containerd, service: &Service, case: &Case) -> Template {
    let log = log_of(containerd, case.name);
    let script = format!(
        "{}\ni=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done",
        case.setup
    );
    run(
        containerd,
        case.name,
        &log,
        "function",
        &["/bin/sh", "-c", &script],
    );
    containerd.until("the function counts", || ticks(&log) >= 3);
    service.snapshot(containerd, case.name)
}

/// Starts the function where it cannot be, and looks for what is left of it.
fn fail(
    containerd: &Containerd,
    service: &Service,
    case: &Case,
    template: &Template,
    method: Method,
) {
    let id = format!("{}-{method}-victim", case.name);
    containerd.run_idle(&id);
    let init = service.info(&id).init_pid;
    let namespaces = Namespaces::of(init);
    let mut request = start_request(containerd, &id, &id, template);
    request.method = method.name().into();
    let listener = matches!(case.obstacle, Obstacle::PortTaken).then(|| listen_in(init));

    let answer = service.repurpose(&request);
    drop(listener);
    let error = format!("{:?}", answer.as_ref().err());
    assert!(error.contains(case.named), "{id}: {error}");
    assert_eq!(code(answer), ttrpc::Code::INTERNAL, "{id}");

    // At once, without anybody asking for it.
    assert_eq!(service.state(&id), proto::State::DEAD, "{id}");
    assert_eq!(
        namespaces.inhabitants(),
        [0; 0],
        "{id}: processes of the sandbox are left"
    );
    let upper = containerd.path(&format!("{id}-upper"));
    assert_eq!(
        mounted(&upper),
        Vec::<String>::new(),
        "{id}: its root is mounted"
    );
    let tasks = containerd.ctr(&["task", "ls"]);
    let task = tasks.lines().find(|line| line.starts_with(&id)).unwrap();
    assert!(task.contains("STOPPED"), "containerd knows: {task}");

    containerd.remove(&id);
    let left: Vec<String> = containerd
        .remains()
        .into_iter()
        .chain(files_below(&containerd.path("trenv-run")))
        .chain(files_below(&containerd.path("trenv-state")))
        .filter(|name| name.contains(&id))
        .collect();
    assert_eq!(left, Vec::<String>::new(), "{id}: this is left");
}

/// Starts it where all is there: in the sandbox that it was taken from, and in one of the id that was
/// given up.
fn succeed(containerd: &Containerd, service: &Service, case: &Case, template: &Template) {
    let again = format!("{}-template-victim", case.name);
    let log = log_of(containerd, &again);
    run(containerd, &again, &log, "idle", &[]);
    for id in [case.name, &again] {
        let request = start_request(containerd, id, &format!("{id}-next"), template);
        let upper = containerd.path(&format!("{id}-next-upper"));
        match &case.obstacle {
            Obstacle::Missing(Missing::File(name)) => {
                std::fs::write(upper.join(name), "x").unwrap();
            }
            Obstacle::Missing(Missing::Folder(name)) => {
                std::fs::create_dir(upper.join(name)).unwrap();
            }
            Obstacle::PortTaken => {}
        }
        let log = log_of(containerd, id);
        std::fs::write(&log, "").unwrap();
        service
            .repurpose(&request)
            .unwrap_or_else(|err| panic!("{id}: {err}\n{}", containerd.logs()));
        containerd.until("the function goes on", || ticks(&log) > 3);
        service.reset(id, &format!("reset-{id}")).unwrap();
    }
    containerd.remove(&again);
}

fn delete(service: &Service, template: &Template) {
    let request = proto::DeleteTemplateRequest {
        request_id: format!("delete-{}", template.id),
        template_id: template.id.clone(),
        ..proto::DeleteTemplateRequest::default()
    };
    let deleted = service
        .sandboxes
        .delete_template(support::service::limit(), &request);
    service.runtime.block_on(deleted).unwrap();
}

/// A sandbox whose output is in a file.
fn run(containerd: &Containerd, id: &str, log: &Path, kind: &str, program: &[&str]) {
    let uri = format!("file://{}", log.display());
    let kind = format!("dev.trenv.sandbox={kind}");
    let sandbox = ["run", "-d", "--log-uri", &uri, "--runtime", support::TRENV];
    let image = ["--annotation", &kind, support::IMAGE, id];
    containerd.ctr(&[&sandbox[..], &image, program].concat());
}

fn log_of(containerd: &Containerd, id: &str) -> PathBuf {
    containerd.path(&format!("{id}.log"))
}

/// The last number that the function wrote.
fn ticks(log: &Path) -> u32 {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let last = text
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("tick "));
    last.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Listens at the function's port in the network of a process.
fn listen_in(pid: u32) -> TcpListener {
    let network = std::fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
    // A thread of its own, since it stays there.
    let listening = std::thread::spawn(move || {
        let kind = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&network), kind)
            .unwrap();
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap()
    });
    listening.join().unwrap()
}

/// Namespaces that nobody but a sandbox's processes is in.
struct Namespaces(Vec<PathBuf>);

impl Namespaces {
    const KINDS: [&'static str; 5] = ["pid", "mnt", "net", "ipc", "uts"];

    fn of(pid: u32) -> Self {
        let links = Self::KINDS.map(|kind| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")));
        Self(links.into_iter().map(Result::unwrap).collect())
    }

    /// Processes in any of them.
    fn inhabitants(&self) -> Vec<i32> {
        let inside = |pid: &i32| {
            Self::KINDS.iter().any(|kind| {
                std::fs::read_link(format!("/proc/{pid}/ns/{kind}"))
                    .is_ok_and(|link| self.0.contains(&link))
            })
        };
        processes().filter(inside).collect()
    }
}

/// Mounts of a directory's, in whatever mount namespace they are.
fn mounted(directory: &Path) -> Vec<String> {
    let name = directory.display().to_string();
    let mut found = Vec::new();
    for pid in processes() {
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"));
        let mounts = mounts.unwrap_or_default();
        let lines = mounts.lines().filter(|line| line.contains(&name));
        found.extend(lines.map(|line| format!("{pid}: {line}")));
    }
    found
}

fn processes() -> impl Iterator<Item = i32> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn files_below(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut all = Vec::new();
    for entry in entries {
        let path = entry.path();
        all.push(path.display().to_string());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.extend(files_below(&path));
        }
    }
    all
}

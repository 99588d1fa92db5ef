//! Manifests as somebody hostile would write them: refused or planned, whatever they say.

use std::path::Path;

use trenv_pool::{Extent, Source};

use super::skeleton::Fill;
use super::tests::sample;
use super::{Plan, PlanError};
use crate::manifest::{
    Descriptor, EpollTarget, FileLock, FileOwner, LockHolder, Manifest, MemoryKind, MemoryObject,
    MessageQueue, Object, ObjectKind, PAGE, PageRun, PosixTimer, QueueMessage, Queued,
    SemaphoreSet, SignalAction, SignalTarget, Socket, SocketFile, TmpfsEntry, TmpfsKind, Watch,
    Zombie,
};

const INPUTS: u64 = 200_000;

fn listener() -> Socket {
    Socket {
        domain: 2,
        kind: 1,
        protocol: 6,
        address: vec![2, 0, 31, 144, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        listen: Some(16),
        connected: Vec::new(),
        options: vec![(1, 2, vec![1, 0, 0, 0])],
        pair: None,
        queue: Vec::new(),
        shutdown: 0,
        file: None,
        interface: None,
    }
}

/// A tree that holds one of everything.
fn rich() -> Manifest {
    let (mut manifest, _) = sample();
    let area = &mut manifest.processes[1].mappings[0];
    area.guards = vec![PageRun {
        start: area.start + 2 * PAGE,
        pages: 1,
    }];
    let socket = listener();
    let end = |writer| ObjectKind::Pipe {
        pipe: 7,
        writer,
        size: 65_536,
        data: vec![1, 2, 3],
    };
    let pair = |side| {
        ObjectKind::Socket(Socket {
            domain: 1,
            address: Vec::new(),
            listen: None,
            options: Vec::new(),
            pair: Some((9, side)),
            queue: vec![Queued {
                data: vec![7; 5],
                rights: vec![0, 2],
            }],
            ..socket.clone()
        })
    };
    let connection = |side: u8| {
        let address = |port| vec![2, 0, 31, port, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        ObjectKind::Socket(Socket {
            address: address(side),
            connected: address(1 - side),
            listen: None,
            pair: Some((11, u32::from(side))),
            queue: vec![Queued {
                data: vec![8; 9],
                rights: Vec::new(),
            }],
            ..socket.clone()
        })
    };
    let target = EpollTarget {
        number: 3,
        events: 1,
        data: 3,
    };
    let kinds = [
        ObjectKind::Stdio(0),
        ObjectKind::Stdio(1),
        ObjectKind::Stdio(2),
        end(false),
        end(true),
        pair(0),
        pair(1),
        connection(0),
        connection(1),
        ObjectKind::Socket(socket.clone()),
        ObjectKind::Socket(Socket {
            interface: Some("eth0".into()),
            ..socket.clone()
        }),
        ObjectKind::Socket(Socket {
            domain: 1,
            address: b"\x01\0/run/a/s\0".to_vec(),
            options: Vec::new(),
            file: Some(SocketFile {
                mode: 0o660,
                uid: 33,
                gid: 33,
            }),
            ..socket.clone()
        }),
        ObjectKind::EventFd {
            count: 1,
            semaphore: true,
        },
        ObjectKind::Epoll {
            targets: vec![target],
        },
        ObjectKind::TimerFd {
            clock: 1,
            flags: 1,
            value: [1, 0],
            interval: [0, 1],
            ticks: 1,
        },
        ObjectKind::SignalFd { mask: 4 },
        ObjectKind::PidFd { pid: 3 },
        ObjectKind::Inotify {
            watches: vec![Watch {
                wd: 4,
                mask: 0x100,
                path: "/run/a".into(),
            }],
        },
        ObjectKind::Nameless {
            memory: 0,
            position: 3,
        },
        ObjectKind::Fifo {
            path: "/run/fifo".into(),
            size: 65_536,
            data: vec![4, 5],
        },
    ];
    manifest.memory.push(MemoryObject {
        size: 9000,
        mode: 0o600,
        uid: 0,
        gid: 0,
        kind: MemoryKind::Memory {
            name: "shared".into(),
            seals: 1,
        },
        pages: Vec::new(),
    });
    manifest.semaphores.push(SemaphoreSet {
        id: 1,
        key: 2,
        mode: 0o600,
        uid: 0,
        gid: 0,
        values: vec![1, 2],
    });
    manifest.message_queues.push(MessageQueue {
        id: 3,
        key: 4,
        mode: 0o600,
        uid: 1,
        gid: 1,
        room: 16_384,
        messages: vec![QueueMessage {
            kind: 5,
            text: vec![6; 7],
        }],
    });
    let root = manifest.processes[0].pid;
    manifest.processes[0].habits.barriers = crate::manifest::REGISTRATIONS;
    manifest.zombies.push(Zombie {
        pid: 77,
        parent: 0,
        group: manifest.processes[0].group,
        session: manifest.processes[0].session,
        uid: 0,
        status: 7 << 8,
    });
    manifest.processes[0].posix_timers.push(PosixTimer {
        id: 3,
        clock: 1,
        signal: 14,
        value: 1,
        notify: nix::libc::SIGEV_SIGNAL,
        target: 0,
        times: [0, 1, 2, 3],
    });
    for kind in kinds {
        let number = manifest.objects.len() as i32;
        let owner = FileOwner {
            target: Some(SignalTarget::Process(root)),
            signal: 40,
            users: [1000, 1001],
        };
        manifest.objects.push(Object {
            flags: 0x2002,
            owner: Some(owner),
            kind,
        });
        let process = &mut manifest.processes[0];
        let mut descriptor = process.descriptors[0].clone();
        descriptor.object = number as usize;
        descriptor.number = 10 + number;
        process.descriptors.push(descriptor);
    }
    let descriptor = manifest.processes[0].descriptors[0].number;
    manifest.locks.push(FileLock {
        holder: LockHolder::Process {
            pid: root,
            descriptor,
        },
        exclusive: true,
        start: 0,
        length: Some(5),
    });
    manifest.processes[0].actions.push(SignalAction {
        signal: 17,
        handler: 0x40_0000,
        flags: 0,
        restorer: 0,
        mask: 0,
    });
    let process = &mut manifest.processes[1];
    let mut thread = process.threads[0].clone();
    thread.tid += 1;
    thread.rseq = Some((0x1000, 32, 1));
    thread.affinity = Some(vec![1; 8]);
    thread.pending = vec![vec![0; 128]];
    process.threads.push(thread);
    for (path, kind) in [
        ("/run/a", TmpfsKind::Directory),
        ("/run/a/f", TmpfsKind::File(vec![1; 9])),
        ("/run/a/l", TmpfsKind::Link("f".into())),
        ("/run/a/s", TmpfsKind::Socket),
    ] {
        manifest.tmpfs.push(TmpfsEntry {
            path: path.into(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            kind,
        });
    }
    manifest
}

fn own(manifest: &mut Manifest, target: SignalTarget, signal: i32) {
    manifest.objects[0].owner = Some(FileOwner {
        target: Some(target),
        signal,
        users: [0; 2],
    });
}

/// A socket of a family, at an address of an interface's own.
fn at_interface(manifest: &mut Manifest, domain: i32, name: &str) {
    manifest.objects[0].kind = ObjectKind::Socket(Socket {
        domain,
        interface: Some(name.into()),
        ..listener()
    });
}

/// Guards in the first mapping of the root, by their place in it and their pages.
fn guard(manifest: &mut Manifest, guards: &[(u64, u64)]) {
    let area = &mut manifest.processes[0].mappings[0];
    let guards = guards.iter().map(|(place, pages)| PageRun {
        start: area.start + place,
        pages: *pages,
    });
    area.guards = guards.collect();
}

fn huge() -> Vec<Extent> {
    let zeros = Extent {
        first_page: 2,
        pages: u64::MAX - 2,
        source: Source::Zero,
    };
    vec![data(2), zeros]
}

fn data(pages: u64) -> Extent {
    Extent {
        first_page: 0,
        pages,
        source: Source::Data { offset: 2 << 20 },
    }
}

/// One that grows as it is planned: many threads, each with all filters.
#[test]
fn a_small_manifest_makes_no_large_plan() {
    let (mut manifest, _) = sample();
    manifest.filters = vec![vec![6; 1000]; 32];
    let process = &mut manifest.processes[0];
    let first = process.threads[0].clone();
    for tid in 1000..2000 {
        let mut thread = first.clone();
        thread.tid = tid;
        thread.filters = (0..32).collect();
        thread.no_new_privileges = false;
        process.threads.push(thread);
    }
    let bytes = manifest.encode().unwrap();
    let manifest = Manifest::decode(&bytes).unwrap();
    let planned =
        Plan::of(&manifest, &[data(manifest.pages())], Fill::Pages).map(|plan| plan.length);
    assert!(
        matches!(planned, Err(super::PlanError::TooLarge { length, .. }) if length > 256 << 20),
        "{planned:?}"
    );
}

/// A mapping of nearly the whole address space takes no longer than a small one: page by page this would
/// not end.
#[test]
fn a_huge_mapping_is_planned_at_once() {
    let (mut manifest, _) = sample();
    for process in &mut manifest.processes {
        process.mappings.truncate(1);
        process.mappings[0].end = 0x7ffe_0000_0000;
    }
    let _ = Plan::of(&manifest, &[data(manifest.pages())], Fill::Pages);
}

/// Who of many holds each of many open files is found out once: for each anew this would take hours.
#[test]
fn many_open_files_of_many_processes_are_counted_once() {
    const FILES: usize = 65536;
    let (mut manifest, _) = sample();
    let socket = Socket {
        domain: nix::libc::AF_UNIX,
        kind: 1,
        protocol: 0,
        address: Vec::new(),
        listen: None,
        connected: b"\x01\0a".to_vec(),
        options: Vec::new(),
        pair: None,
        queue: Vec::new(),
        shutdown: 0,
        file: None,
        interface: None,
    };
    let mut last = manifest.processes[1].clone();
    last.descriptors = (0..FILES)
        .map(|index| Descriptor {
            number: 3 + index as i32,
            object: FILES - 1 - index,
            close_on_exec: false,
        })
        .collect();
    for pid in 4..20 {
        last.pid = pid;
        last.threads[0].tid = pid;
        manifest.processes.push(last.clone());
    }
    let kinds = [
        ObjectKind::Epoll {
            targets: Vec::new(),
        },
        ObjectKind::PidFd { pid: 19 },
        ObjectKind::Socket(socket),
    ];
    let owner = FileOwner {
        target: Some(SignalTarget::Thread(19)),
        signal: 0,
        users: [0; 2],
    };
    let objects = kinds.iter().cycle().take(FILES).map(|kind| Object {
        flags: 0,
        owner: Some(owner),
        kind: kind.clone(),
    });
    manifest.objects = objects.collect();
    let planned = Plan::of(&manifest, &[data(manifest.pages())], Fill::Pages);
    // It is known at the end only.
    assert!(matches!(planned, Err(PlanError::TooLarge { .. })));
}

#[test]
fn references_to_nothing_are_refused() {
    type Change = fn(&mut Manifest);
    let changes: [(&str, Change); 20] = [
        ("interface of socket 0", |m| at_interface(m, 2, "")),
        ("interface of socket 0", |m| at_interface(m, 1, "eth0")),
        ("standard stream 3", |m| {
            m.objects[0].kind = ObjectKind::Stdio(3);
        }),
        ("seccomp filters", |m| m.filters = vec![Vec::new(); 9000]),
        ("resource limits", |m| {
            m.processes[0].limits = vec![(0, 0); 17];
        }),
        ("was killed by signal 11 and leads the session", |m| {
            m.zombies.push(Zombie {
                pid: 77,
                parent: 0,
                group: 77,
                session: 77,
                uid: 0,
                status: 11,
            });
            let orphan = &mut m.processes[1];
            (orphan.parent, orphan.group, orphan.session) = (None, 77, 77);
        }),
        ("SysV message queue -1", |m| {
            m.message_queues.push(MessageQueue {
                id: -1,
                key: 0,
                mode: 0,
                uid: 0,
                gid: 0,
                room: 0,
                messages: Vec::new(),
            });
        }),
        ("owner of open file 0", |m| {
            own(m, SignalTarget::Process(9), 0);
        }),
        ("owner of open file 0", |m| {
            own(m, SignalTarget::Group(-2), 0);
        }),
        ("owner of open file 0", |m| {
            own(m, SignalTarget::Thread(2), 65);
        }),
        ("memory barriers of process 2", |m| {
            m.processes[0].habits.barriers = 1 << 5;
        }),
        ("guard pages at 0x400001", |m| guard(m, &[(1, 1)])),
        ("guard pages at 0x404000", |m| guard(m, &[(0x4000, 1)])),
        ("guard pages at 0x401000", |m| {
            guard(m, &[(0x1000, u64::MAX / PAGE)]);
        }),
        ("guard pages at 0x402000", |m| {
            guard(m, &[(0x1000, 2), (0x2000, 1)]);
        }),
        ("pages at 0x400000 of process 2 are guards", |m| {
            guard(m, &[(0, 1)]);
        }),
        ("guard pages at 0x7ffd00000000", |m| {
            let start = 0x7ffd_0000_0000;
            m.processes[0].mappings[1].guards = vec![PageRun { start, pages: 1 }];
        }),
        ("main thread", |m| m.processes[0].threads[0].tid = 9),
        ("thread 2", |m| {
            m.processes[1].pid = 2;
            m.processes[1].threads[0].tid = 2;
        }),
        ("thread -1", |m| {
            m.processes[1].pid = -1;
            m.processes[1].threads[0].tid = -1;
        }),
    ];
    for (word, change) in changes {
        let (mut manifest, _) = sample();
        change(&mut manifest);
        let err = Manifest::decode(&manifest.encode().unwrap()).unwrap_err();
        assert!(err.to_string().contains(word), "{word}: {err}");
    }
}

#[test]
fn no_manifest_brings_planning_down() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/manifest");
    let (small, _) = sample();
    let seeds = [&small, &rich()].map(|manifest| manifest.encode().unwrap());
    for seed in &seeds {
        let manifest = Manifest::decode(seed).unwrap();
        let planned = Plan::of(&manifest, &[data(manifest.pages())], Fill::Pages);
        assert!(planned.is_ok(), "{:?}", planned.map(|plan| plan.length));
    }
    if std::env::var_os("TRENV_WRITE_CORPUS").is_some() {
        for (name, seed) in ["small", "rich"].iter().zip(&seeds) {
            std::fs::write(corpus.join(name), seed).unwrap();
        }
    }
    let mut planned = 0u32;
    trenv_fuzz::run(&corpus, &seeds, INPUTS, |bytes| {
        let Ok(manifest) = Manifest::decode(bytes) else {
            return;
        };
        // Pages as the manifest counts them, and as a record might.
        let fitting = [data(manifest.pages())];
        for extents in [&fitting[..], &huge()] {
            planned += u32::from(Plan::of(&manifest, extents, Fill::Pages).is_ok());
        }
    });
    assert!(planned > 100, "only {planned} inputs came as far as a plan");
}

//! Want of memory: the process that takes too much dies, containerd is told, and nothing else is
//! harmed.

#![allow(clippy::unwrap_used)]

mod support;

use support::events::Events;
use support::service::{Service, seated, start_request, zygotes};
use support::{Containerd, IMAGE, RUNC, TRENV, containerd};
use trenv_sandbox_proto as proto;

const LIMIT: u64 = 48 << 20;

/// Counts; told by a file, a child of it or it itself takes far more memory than the limit allows.
const EATER: &str = r#"
eat() { n=0; x=x; while [ $n -lt 28 ]; do x=$x$x; n=$((n+1)); done; }
i=0
while :; do
    i=$((i+1)); echo tick $i; sleep 0.1
    if [ -e /run/child ] && [ ! -e /run/childless ]; then
        touch /run/childless
        ( eat )
        echo child ended with $?
    fi
    if [ -e /run/self ]; then eat; echo ate it all; fi
done"#;

fn tell(containerd: &Containerd, id: &str, word: &str) {
    let file = format!("/run/{word}");
    let line = ["task", "exec", "--exec-id", word, id, "/bin/touch", &file];
    containerd.ctr(&line);
}

fn is_running(containerd: &Containerd, id: &str) -> bool {
    let list = containerd.ctr(&["task", "ls"]);
    list.lines()
        .any(|line| line.starts_with(id) && line.contains("RUNNING"))
}

/// Topics of a container's first process.
fn topics(events: &Events, id: &str) -> Vec<String> {
    let mut all = events.short(id);
    all.retain(|told| {
        told.starts_with("tasks/oom") || told.starts_with(&format!("tasks/exit {id}"))
    });
    all
}

fn parent(pid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

fn deleted_with(containerd: &Containerd, id: &str) -> String {
    let output = containerd.try_ctr(&["task", "rm", id]);
    containerd.ctr(&["container", "rm", id]);
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_tenancy_over_its_limit_dies_alone_and_containerd_is_told() {
    let Some(containerd) = containerd("oom") else {
        return;
    };
    let events = Events::follow(&containerd);
    containerd.run_function("f", EATER);
    let log = containerd.path("idle.log");
    containerd.ctr(&[
        "run",
        "-d",
        "--log-uri",
        &format!("file://{}", log.display()),
        "--runtime",
        TRENV,
        "--annotation",
        "dev.trenv.sandbox=idle",
        IMAGE,
        "idle",
    ]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    let service = Service::connect(&containerd);
    let template = service.snapshot(&containerd, "f");
    let limits = proto::Limits {
        memory_bytes: LIMIT,
        ..proto::Limits::default()
    };
    service.prepare(&containerd, &template, &limits);
    // On cgroup v1 the agents wait in their seats, beside the clones that they made; on v2 they sit
    // with the zygote, which is older, and end with their tenancies.
    let zygote = zygotes(&containerd)[0];
    let mut agents = seated(&containerd);
    agents.retain(|pid| parent(*pid) == Some(zygote));
    assert!(agents.len() == 2 || agents.is_empty(), "{agents:?}");
    let start = |sandbox: &str, name: &str| {
        let mut request = start_request(&containerd, sandbox, name, &template);
        request.limits = Some(limits.clone()).into();
        service
            .repurpose(&request)
            .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()))
    };

    // A child dies: the function goes on, and containerd knows at once.
    start("idle", "one");
    tell(&containerd, "idle", "child");
    containerd.until("containerd is told of a child", || {
        topics(&events, "idle") == ["tasks/oom"]
    });
    containerd.until("the function sees its child's end", || {
        std::fs::read_to_string(&log)
            .unwrap()
            .contains("child ended with 137\ntick")
    });
    assert_eq!(service.state("idle"), proto::State::READY);

    // The function itself dies: the task ends with it.
    tell(&containerd, "idle", "self");
    let wanted = ["tasks/oom", "tasks/oom", "tasks/exit idle 137"];
    containerd.until("containerd is told of the end", || {
        topics(&events, "idle") == wanted
    });
    assert_eq!(service.state("idle"), proto::State::DEAD);
    let words = deleted_with(&containerd, "idle");
    assert!(words.contains("137"), "{words}");
    assert!(
        !std::fs::read_to_string(&log)
            .unwrap()
            .contains("ate it all")
    );

    // Neither the zygote nor an agent took harm, and the next start uses them.
    assert!(zygotes(&containerd).contains(&zygote));
    let living = seated(&containerd);
    assert!(
        agents.iter().all(|agent| living.contains(agent)),
        "{agents:?} in {living:?}"
    );
    for round in 0..3 {
        let name = format!("next{round}");
        start("f", &name);
        assert!(is_running(&containerd, "f"));
        service.reset("f", &name).unwrap();
    }
    assert!(zygotes(&containerd).contains(&zygote));
    let built = containerd.logs().matches("Built the zygote").count();
    assert_eq!(built, 1, "{}", containerd.logs());
    assert!(
        agents.is_empty() || !containerd.logs().contains("on the call's path"),
        "{}",
        containerd.logs()
    );

    // A seat's counter is never set back, but an old death is not told of a new tenancy.
    start("f", "last");
    containerd.ctr(&["task", "kill", "-s", "9", "f"]);
    containerd.until("the end is told", || events.has("f", "tasks/exit"));
    assert_eq!(topics(&events, "f"), ["tasks/exit f 137"]);
    deleted_with(&containerd, "f");
    drop(service);
    drop(events);
    containerd.assert_clean();
}

#[test]
fn want_of_memory_is_told_as_by_the_stock_shim() {
    let Some(containerd) = containerd("oomstock") else {
        return;
    };
    let events = Events::follow(&containerd);
    let limit = LIMIT.to_string();
    let see = |runtime: &str, flags: &[&str], id: &str| {
        let mut line = vec!["run", "-d", "--memory-limit", &limit, "--runtime", runtime];
        line.extend(flags);
        line.extend([IMAGE, id, "/bin/sh", "-c", EATER]);
        containerd.ctr(&line);
        tell(&containerd, id, "child");
        containerd.until("containerd is told of a child", || {
            topics(&events, id) == ["tasks/oom"]
        });
        assert!(is_running(&containerd, id));
        tell(&containerd, id, "self");
        containerd.until("containerd is told of the end", || {
            topics(&events, id).len() == 3
        });
        assert!(deleted_with(&containerd, id).contains("137"));
        let told = topics(&events, id);
        told.iter()
            .map(|told| told.replace(id, ""))
            .collect::<Vec<_>>()
    };
    let stock = see(RUNC, &[], &containerd.unique("stock"));
    let ours = see(TRENV, &[], &containerd.unique("ours"));
    let cold = ["--annotation", "dev.trenv.sandbox=function"];
    let cold = see(TRENV, &cold, &containerd.unique("cold"));
    println!("{stock:?}");
    assert_eq!(ours.last(), stock.last());
    assert_eq!(cold, ours);
    let count = |told: &[String]| told.iter().filter(|one| *one == "tasks/oom").count();
    assert_eq!(count(&ours), count(&stock));
    drop(events);
    containerd.assert_clean();
}

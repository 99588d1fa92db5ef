//! What a swap of roots and a purge take, step by step. Run with `--nocapture` to see the figures;
//! the test itself only holds open that a swap stays far from the cost of a new sandbox.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

mod support;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use support::Place;
use trenv_sandbox::{Step, process::Role, rootfs};

const ROUNDS: usize = 100;

#[derive(Default)]
struct Figures(BTreeMap<String, Vec<Duration>>);

impl Figures {
    fn add(&mut self, name: &str, took: Duration) {
        self.0.entry(name.to_owned()).or_default().push(took);
    }

    fn add_all(&mut self, kind: &str, whole: Duration, steps: &[Step]) {
        self.add(&format!("{kind} (whole)"), whole);
        for step in steps {
            self.add(&format!("{kind}: {}", step.name), step.took);
        }
    }

    fn median(&mut self, name: &str) -> Duration {
        let all = self.0.get_mut(name).unwrap();
        all.sort_unstable();
        all[all.len() / 2]
    }
}

#[test]
fn a_swap_of_roots_is_quick() {
    let place = Place::new();
    let mut figures = Figures::default();
    let start = Instant::now();
    let sandbox = place.sandbox();
    figures.add("create", start.elapsed());
    for round in 0..ROUNDS {
        let tenancy = format!("t{round}");
        let mounts = place.mounts(&tenancy);
        let start = Instant::now();
        let overlay = rootfs::overlay_from_mounts(&mounts).unwrap();
        figures.add("build an overlay", start.elapsed());
        let start = Instant::now();
        drop(overlay);
        figures.add("drop an overlay", start.elapsed());
        let root = place.rootfs(&tenancy);
        // An idle sandbox has had time to make its parts.
        std::thread::sleep(Duration::from_millis(2));
        let start = Instant::now();
        let steps = sandbox.enter_rootfs(&root).unwrap();
        figures.add_all("enter", start.elapsed(), &steps);
        drop(root);
        let start = Instant::now();
        let steps = sandbox.purge().unwrap();
        figures.add_all("purge", start.elapsed(), &steps);
    }
    let cgroup = place.cgroup("t");
    for _ in 0..ROUNDS / 10 {
        sandbox.enter_rootfs(&place.rootfs("tree")).unwrap();
        let (stdio, _output) = support::stdio();
        let tree = support::shell(Role::Root, "sleep 100 & sleep 100 & sleep 100");
        let start = Instant::now();
        sandbox.spawn(&tree, stdio, &cgroup).unwrap();
        figures.add("spawn", start.elapsed());
        std::thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        cgroup.kill_all().unwrap();
        figures.add("kill a tree of four by its cgroup", start.elapsed());
        let start = Instant::now();
        let steps = sandbox.purge().unwrap();
        figures.add_all("then purge", start.elapsed(), &steps);
    }
    let names: Vec<String> = figures.0.keys().cloned().collect();
    for name in names {
        let median = figures.median(&name);
        let last = figures.0[&name].last().copied().unwrap_or_default();
        println!(
            "{name:<34} P50 {:>6} us   max {:>6} us",
            median.as_micros(),
            last.as_micros()
        );
    }
    assert!(figures.median("enter (whole)") < Duration::from_millis(5));
    sandbox.destroy().unwrap();
}

//! The scheduler's rules, with sandboxes that exist only in the test.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    ColdStart, Guard, ParkedStart, SandboxOps, SandboxRef, Scheduler, SchedulerOptions, StartError,
    StartKind,
};
use crate::containerd::{ImageConfig, ResolvedImage};
use crate::functions::{
    FunctionName, Limits, Process, Revision, RevisionRecord, RevisionState, StartMethod, Template,
};
use crate::metrics::Metrics;
use crate::shim_client::Step;

/// Sandboxes in memory; it panics when an operation is used against its contract.
#[derive(Debug, Default)]
struct Fake {
    idle: Mutex<HashSet<String>>,
    serving: Mutex<HashSet<String>>,
    destroyed: AtomicU64,
    made: AtomicU64,
    resets: AtomicU64,
    /// What the tenancy that was reset last had served.
    served: Mutex<Option<String>>,
    fail_next: AtomicBool,
    template_gone: AtomicBool,
    slow: AtomicBool,
}

impl Fake {
    fn count(&self) -> usize {
        self.idle.lock().unwrap().len() + self.serving.lock().unwrap().len()
    }
}

#[async_trait]
impl SandboxOps for Fake {
    async fn create_idle(&self, sandbox: &SandboxRef) -> Result<SocketAddr, StartError> {
        tokio::task::yield_now().await;
        self.made.fetch_add(1, Ordering::Relaxed);
        assert!(self.idle.lock().unwrap().insert(sandbox.id.clone()));
        Ok("127.0.0.1:1".parse().unwrap())
    }

    async fn cold_start(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
    ) -> Result<ColdStart, StartError> {
        self.made.fetch_add(1, Ordering::Relaxed);
        assert!(self.serving.lock().unwrap().insert(sandbox.id.clone()));
        Ok(ColdStart {
            address: "127.0.0.1:1".parse().unwrap(),
            tenancy: revision.new_tenancy(),
            steps: vec![("ready".into(), 1)],
        })
    }

    async fn repurpose(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        _: &Template,
        _: &str,
    ) -> Result<(String, Vec<Step>), StartError> {
        if self.slow.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let function = revision.function().to_string();
        assert!(
            self.idle.lock().unwrap().remove(&sandbox.id),
            "only an idle sandbox"
        );
        if self.template_gone.load(Ordering::Relaxed) {
            return Err(StartError::TemplateGone {
                function,
                reason: "test".into(),
            });
        }
        if self.fail_next.swap(false, Ordering::Relaxed) {
            return Err(StartError::Start {
                function,
                reason: "test".into(),
            });
        }
        self.serving.lock().unwrap().insert(sandbox.id.clone());
        Ok((revision.new_tenancy(), vec![("restore".into(), 1)]))
    }

    async fn park(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        template: &Template,
    ) -> Result<ParkedStart, StartError> {
        let (tenancy, _) = self.repurpose(sandbox, revision, template, "").await?;
        let spec = Vec::new();
        Ok(ParkedStart { tenancy, spec })
    }

    async fn resume(
        &self,
        sandbox: &SandboxRef,
        _: &Arc<Revision>,
        _: ParkedStart,
    ) -> Result<Vec<Step>, StartError> {
        assert!(self.serving.lock().unwrap().contains(&sandbox.id));
        Ok(vec![("resume".into(), 1)])
    }

    async fn reset(
        &self,
        sandbox: &SandboxRef,
        _: &str,
        served: Option<&str>,
    ) -> Result<Vec<Step>, StartError> {
        *self.served.lock().unwrap() = served.map(str::to_owned);
        assert!(
            self.serving.lock().unwrap().remove(&sandbox.id),
            "only one with a tenancy"
        );
        self.idle.lock().unwrap().insert(sandbox.id.clone());
        self.resets.fetch_add(1, Ordering::Relaxed);
        Ok(vec![("purge".into(), 1)])
    }

    async fn destroy(&self, sandbox: &SandboxRef, _: Option<&str>) {
        self.destroyed.fetch_add(1, Ordering::Relaxed);
        self.idle.lock().unwrap().remove(&sandbox.id);
        self.serving.lock().unwrap().remove(&sandbox.id);
    }
}

struct World {
    fake: Arc<Fake>,
    scheduler: Arc<Scheduler>,
    gone: UnboundedReceiver<Arc<Revision>>,
}

fn world(limit: usize, idle: usize) -> World {
    parking_world(limit, idle, 0)
}

fn parking_world(limit: usize, idle: usize, parked: usize) -> World {
    let fake = Arc::new(Fake::default());
    let (sender, gone) = tokio::sync::mpsc::unbounded_channel();
    let scheduler = Scheduler::new(
        Arc::clone(&fake) as _,
        SchedulerOptions {
            limit,
            idle,
            parked,
            keep_alive: None,
            patience: Duration::from_millis(300),
        },
        Arc::new(Metrics::new()),
        sender,
    );
    World {
        fake,
        scheduler,
        gone,
    }
}

fn template() -> RevisionState {
    RevisionState::Ready(Template {
        id: "t".into(),
        generation: 1,
        key: "k".into(),
        layer: "l".into(),
        view: "v".into(),
        image_bytes: 0,
        stored_bytes: 0,
        notes: vec![],
        base: None,
    })
}

fn revision_in(namespace: &str, name: &str, state: RevisionState) -> Arc<Revision> {
    let record = RevisionRecord {
        id: format!("{name}-1"),
        function: FunctionName {
            namespace: namespace.into(),
            name: name.into(),
        },
        image: ResolvedImage {
            name: String::new(),
            digest: String::new(),
            target: String::new(),
            chain_id: String::new(),
            config: ImageConfig::default(),
        },
        process: Process::default(),
        limits: Limits::default(),
        read_only: false,
        secrets: vec![],
        ready_path: None,
        base: None,
        criu: false,
        lease: String::new(),
    };
    Arc::new(Revision::new(record, vec![], 1, state))
}

fn function(name: &str) -> Arc<Revision> {
    revision_in("ns", name, template())
}

impl World {
    async fn acquire(&self, revision: &Arc<Revision>) -> Guard {
        self.scheduler.acquire(revision, "").await.unwrap()
    }

    async fn idle_sandbox(&self) {
        let made = function("none");
        let sandbox = self.scheduler.reserve(&made).await.unwrap();
        let address = self.fake.create_idle(&sandbox).await.unwrap();
        self.scheduler.set_sandbox_address(&sandbox, address);
        self.scheduler.put_idle(&sandbox);
    }
}

/// Lets background work run until `done`.
async fn until(done: impl Fn() -> bool) {
    for _ in 0..500 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("it did not come to it");
}

#[tokio::test]
async fn a_call_is_warm_repurposed_evicted_or_cold_in_this_order() {
    let w = world(2, 0);
    let (a, b) = (function("a"), function("b"));
    w.idle_sandbox().await;
    let first = w.acquire(&a).await;
    assert_eq!(first.kind, StartKind::Repurposed);
    let sandbox = first.sandbox.clone();
    drop(first);
    let again = w.acquire(&a).await;
    assert_eq!((again.kind, &again.sandbox), (StartKind::Warm, &sandbox));
    assert!(again.steps.is_empty());
    drop(again);
    let evicting = w.acquire(&b).await;
    assert_eq!(
        (evicting.kind, &evicting.sandbox),
        (StartKind::Evicted, &sandbox)
    );
    let names: Vec<&str> = evicting.steps.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(names, ["purge", "restore"]);
    let fresh = w.acquire(&b).await;
    assert_eq!(fresh.kind, StartKind::Cold);
    assert_ne!(fresh.sandbox, sandbox);
}

#[tokio::test]
async fn the_victim_is_the_instance_used_least_recently() {
    let w = world(3, 0);
    let names = ["a", "b", "c"].map(function);
    let mut sandboxes = Vec::new();
    // Held together, so that each gets a sandbox of its own.
    let mut held = Vec::new();
    for revision in &names {
        held.push(w.acquire(revision).await);
    }
    for guard in held {
        sandboxes.push(guard.sandbox.clone());
        drop(guard);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drop(w.acquire(&names[0]).await);
    let taken = w.acquire(&function("d")).await;
    assert_eq!(taken.sandbox, sandboxes[1]);
}

#[tokio::test]
async fn an_instance_serves_one_call_unless_its_function_allows_more() {
    let w = world(4, 0);
    let a = function("a");
    let one = w.acquire(&a).await;
    let two = w.acquire(&a).await;
    assert_ne!(one.sandbox, two.sandbox);
    a.set_concurrency(2);
    let three = w.acquire(&a).await;
    assert_eq!(three.kind, StartKind::Warm);
}

#[tokio::test]
async fn a_call_waits_for_room_and_gives_up_in_the_end() {
    let w = world(1, 0);
    let (a, b) = (function("a"), function("b"));
    let busy = w.acquire(&a).await;
    let refused = w.scheduler.acquire(&b, "").await;
    assert!(
        matches!(refused, Err(StartError::Busy { limit: 1, .. })),
        "{refused:?}"
    );
    let scheduler = Arc::clone(&w.scheduler);
    let waiting = tokio::spawn(async move { scheduler.acquire(&b, "").await.unwrap() });
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(busy);
    let served = waiting.await.unwrap();
    assert_eq!(served.kind, StartKind::Evicted);
    assert_eq!(w.fake.count(), 1);
}

#[tokio::test]
async fn every_waiting_call_is_served_in_turn() {
    let w = world(2, 0);
    let revisions: Vec<_> = (0..4).map(|n| function(&format!("f{n}"))).collect();
    let calls = (0..40).map(|n| {
        let (scheduler, revision) = (Arc::clone(&w.scheduler), Arc::clone(&revisions[n % 4]));
        tokio::spawn(async move {
            let guard = scheduler.acquire(&revision, "").await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
            drop(guard);
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    assert!(w.fake.count() <= 2);
}

#[tokio::test]
async fn a_sandbox_never_changes_its_namespace() {
    let w = world(1, 0);
    w.idle_sandbox().await;
    let other = revision_in("other", "a", template());
    let guard = w.acquire(&other).await;
    assert_eq!(guard.kind, StartKind::Cold);
    assert_eq!(guard.sandbox.namespace, "other");
    assert_eq!(w.fake.count(), 1);
}

#[tokio::test]
async fn a_function_without_a_template_gets_a_new_sandbox_each_time() {
    let w = world(1, 0);
    w.idle_sandbox().await;
    let cold = revision_in("ns", "a", RevisionState::Cold("why".into()));
    let guard = w.acquire(&cold).await;
    assert_eq!(guard.kind, StartKind::Cold);
    drop(guard);
    assert_eq!(w.acquire(&cold).await.kind, StartKind::Warm);
    assert_eq!(w.fake.count(), 1);
}

#[tokio::test]
async fn calls_wait_while_a_function_is_built() {
    let w = world(2, 0);
    let a = revision_in("ns", "a", RevisionState::Building);
    let refused = w.scheduler.acquire(&a, "").await;
    assert!(matches!(refused, Err(StartError::Building { .. })));
    let (scheduler, revision) = (Arc::clone(&w.scheduler), Arc::clone(&a));
    let waiting =
        tokio::spawn(async move { scheduler.acquire(&revision, "").await.map(|g| g.kind) });
    tokio::time::sleep(Duration::from_millis(20)).await;
    a.set_state(template());
    assert_eq!(waiting.await.unwrap().unwrap(), StartKind::Cold);
    a.set_state(RevisionState::Failed("it crashed".into()));
    let failed = w.scheduler.acquire(&a, "").await.unwrap_err().to_string();
    assert!(failed.contains("it crashed"), "{failed}");
}

#[tokio::test]
async fn an_instance_that_runs_serves_while_its_template_is_made_anew() {
    let w = world(2, 0);
    let a = function("a");
    drop(w.acquire(&a).await);
    a.set_state(RevisionState::Building);
    assert_eq!(w.acquire(&a).await.kind, StartKind::Warm);
}

#[tokio::test]
async fn a_failed_start_is_tried_once_more_and_leaves_nothing() {
    let w = world(2, 0);
    let a = function("a");
    w.fake.fail_next.store(true, Ordering::Relaxed);
    let guard = w.acquire(&a).await;
    assert_eq!(guard.kind, StartKind::Cold);
    assert_eq!(w.fake.destroyed.load(Ordering::Relaxed), 1);
    assert_eq!(w.scheduler.counts(), (0, 1, 1));
}

#[tokio::test]
async fn a_lost_template_is_reported() {
    let mut w = world(2, 0);
    let a = function("a");
    w.fake.template_gone.store(true, Ordering::Relaxed);
    let err = w.scheduler.acquire(&a, "").await.unwrap_err();
    assert!(matches!(err, StartError::TemplateGone { .. }));
    assert!(Arc::ptr_eq(&w.gone.recv().await.unwrap(), &a));
}

#[tokio::test]
async fn a_client_that_leaves_during_a_start_leaves_an_idle_instance() {
    let w = world(2, 0);
    let a = function("a");
    w.fake.slow.store(true, Ordering::Relaxed);
    let left = tokio::time::timeout(Duration::from_millis(20), w.scheduler.acquire(&a, "")).await;
    assert!(left.is_err());
    until(|| w.scheduler.counts() == (0, 1, 1)).await;
    assert_eq!(w.acquire(&a).await.kind, StartKind::Warm);
}

#[tokio::test]
async fn a_broken_instance_is_destroyed_and_not_used_again() {
    let w = world(2, 0);
    let a = function("a");
    let mut guard = w.acquire(&a).await;
    let sandbox = guard.sandbox.clone();
    guard.mark_broken();
    drop(guard);
    assert_ne!(w.acquire(&a).await.sandbox, sandbox);
    until(|| w.fake.destroyed.load(Ordering::Relaxed) == 1).await;
}

#[tokio::test]
async fn a_dead_sandbox_ends_its_calls_and_is_forgotten() {
    let w = world(2, 0);
    let a = function("a");
    let guard = w.acquire(&a).await;
    w.scheduler.sandbox_died(&guard.sandbox.id);
    assert!(guard.gone.is_cancelled());
    until(|| w.scheduler.counts() == (0, 0, 0)).await;
    drop(guard);
    assert_eq!(w.acquire(&a).await.kind, StartKind::Cold);
}

#[tokio::test]
async fn a_retired_revision_gives_up_its_sandboxes() {
    let w = world(4, 0);
    let a = function("a");
    let (busy, idle) = (w.acquire(&a).await, w.acquire(&a).await);
    drop(idle);
    a.retire();
    w.scheduler.end_instances(&a);
    until(|| w.scheduler.counts().0 == 1).await;
    drop(busy);
    until(|| w.scheduler.counts() == (2, 0, 2)).await;
    assert!(matches!(
        w.scheduler.acquire(&a, "").await,
        Err(StartError::Removed { .. })
    ));
}

#[tokio::test]
async fn upkeep_keeps_idle_sandboxes_and_wanted_instances() {
    let w = world(6, 2);
    w.scheduler.serve_namespace("ns");
    let upkeep = tokio::spawn(Arc::clone(&w.scheduler).run_upkeep());
    until(|| w.scheduler.counts() == (2, 0, 2)).await;
    let a = function("a");
    let guard = w.acquire(&a).await;
    assert_eq!(guard.kind, StartKind::Repurposed);
    until(|| w.scheduler.counts() == (2, 1, 3)).await;
    drop(guard);
    w.scheduler.set_floor(a.function(), Some(3));
    w.scheduler.grow(&a, 3).await;
    assert_eq!(w.scheduler.count_of(&a), 3);
    w.scheduler.shrink(&a, 1);
    until(|| w.scheduler.count_of(&a) == 1).await;
    w.scheduler.stop(Duration::from_secs(1)).await;
    upkeep.await.unwrap();
    assert!(matches!(
        w.scheduler.acquire(&a, "").await,
        Err(StartError::Stopping)
    ));
}

#[tokio::test]
async fn an_instance_that_is_kept_gives_way_last() {
    let w = world(2, 0);
    let (a, b, c) = (function("a"), function("b"), function("c"));
    let (kept, other) = (w.acquire(&a).await, w.acquire(&b).await);
    let sandboxes = (kept.sandbox.clone(), other.sandbox.clone());
    drop(kept);
    tokio::time::sleep(Duration::from_millis(2)).await;
    drop(other);
    w.scheduler.set_floor(a.function(), Some(1));
    let third = w.acquire(&c).await;
    assert_eq!(third.sandbox, sandboxes.1);
    // Full of calls and kept instances: a kept one gives way rather than a call fail.
    let last = w.acquire(&b).await;
    assert_eq!(last.sandbox, sandboxes.0);
}

/// Starts an instance of each function and ends it again.
async fn called_once(w: &World, revisions: &[&Arc<Revision>]) {
    for revision in revisions {
        drop(w.acquire(revision).await);
        w.scheduler.end_instances(revision);
        until(|| w.scheduler.count_of(revision) == 0).await;
        until(|| w.scheduler.counts().0 > 0).await;
    }
}

#[tokio::test]
async fn functions_that_were_called_are_parked_and_their_next_call_goes_on_there() {
    let w = parking_world(6, 1, 1);
    w.scheduler.serve_namespace("ns");
    let upkeep = tokio::spawn(Arc::clone(&w.scheduler).run_upkeep());
    let (a, b) = (function("a"), function("b"));
    called_once(&w, &[&a]).await;
    until(|| w.scheduler.parked_of(&a) == 1).await;
    // An idle sandbox stays for functions that nobody expects.
    assert_eq!(w.acquire(&b).await.kind, StartKind::Repurposed);
    let guard = w.acquire(&a).await;
    assert_eq!(guard.kind, StartKind::Parked);
    assert_eq!(guard.steps, [("resume".to_owned(), 1)]);
    w.scheduler.stop(Duration::from_secs(1)).await;
    upkeep.await.unwrap();
}

#[tokio::test]
async fn a_parked_instance_gives_way_when_nothing_is_idle_and_before_one_that_has_served() {
    let w = parking_world(2, 0, 1);
    let (a, b) = (function("a"), function("b"));
    let served = w.acquire(&a).await;
    w.idle_sandbox().await;
    w.scheduler.park().await;
    assert_eq!(w.scheduler.parked_of(&a), 1);
    let sandbox = served.sandbox.clone();
    drop(served);
    let evicting = w.acquire(&b).await;
    assert_eq!(evicting.kind, StartKind::Evicted);
    assert_ne!(evicting.sandbox, sandbox, "the one that has served stays");
    assert_eq!(w.scheduler.parked_of(&a), 0);
}

#[tokio::test]
async fn a_function_that_is_wanted_more_takes_the_place_of_a_parked_one() {
    let w = parking_world(6, 0, 1);
    let (a, b) = (function("a"), function("b"));
    called_once(&w, &[&a]).await;
    w.scheduler.park().await;
    assert_eq!(w.scheduler.parked_of(&a), 1);
    w.idle_sandbox().await;
    called_once(&w, &[&b, &b, &b]).await;
    w.scheduler.park().await;
    until(|| w.scheduler.parked_of(&a) == 0 && w.scheduler.counts().0 == 2).await;
    w.scheduler.park().await;
    assert_eq!(w.scheduler.parked_of(&b), 1);
}

#[tokio::test]
async fn a_retired_revision_is_not_parked_any_more() {
    let w = parking_world(4, 0, 2);
    let a = function("a");
    called_once(&w, &[&a]).await;
    w.scheduler.park().await;
    assert_eq!(w.scheduler.parked_of(&a), 1);
    a.retire();
    w.scheduler.end_instances(&a);
    until(|| w.scheduler.counts() == (1, 0, 1)).await;
    w.scheduler.park().await;
    assert_eq!(w.scheduler.parked_of(&a), 0);
}

#[tokio::test]
async fn a_function_whose_start_method_cannot_park_is_not_parked_any_more() {
    let w = parking_world(4, 0, 2);
    let a = function("a");
    called_once(&w, &[&a]).await;
    w.scheduler.park().await;
    assert_eq!(w.scheduler.parked_of(&a), 1);
    a.methods.set(StartMethod::Copy);
    w.scheduler.end_parked(&a);
    until(|| w.scheduler.counts() == (1, 0, 1)).await;
    w.scheduler.park().await;
    assert_eq!(w.scheduler.parked_of(&a), 0);
    a.methods.set(StartMethod::Template);
    w.scheduler.park().await;
    assert_eq!(w.scheduler.parked_of(&a), 1);
}

#[tokio::test]
async fn a_tenancy_ends_with_the_input_that_it_served() {
    let w = world(1, 0);
    let functions = ["a", "b", "c", "d"].map(function);
    let mut ended = Vec::new();
    for (revision, inputs) in
        functions
            .iter()
            .zip([&["big"][..], &["big", "big"], &["big", "small"], &[]])
    {
        for input in inputs {
            let guard = w.scheduler.acquire(revision, input).await.unwrap();
            guard.mark_called(input);
        }
        drop(w.acquire(revision).await);
        // Its sandbox is handed on.
        drop(w.acquire(&function("next")).await);
        ended.push(w.fake.served.lock().unwrap().clone());
    }
    let ended: Vec<Option<&str>> = ended.iter().map(Option::as_deref).collect();
    assert_eq!(ended, [Some("big"), Some("big"), Some(""), None]);
}

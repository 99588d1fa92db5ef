//! Network namespaces on a real bridge. Needs root, the CNI plugins and nft.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use trenv_cni::{NetnsPool, Network, NetworkConfig, NetworkError};

struct Place {
    dir: tempfile::TempDir,
    config: NetworkConfig,
}

impl Place {
    fn new() -> Self {
        static COUNT: AtomicU8 = AtomicU8::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let dir = tempfile::tempdir().unwrap();
        let config = NetworkConfig {
            bridge: format!("tt{pid}-{number}"),
            subnet: format!("10.{}.{number}.0/24", 200 + pid % 50),
            plugin_dir: "/usr/lib/cni".into(),
            state_dir: dir.path().join("state"),
            run_dir: dir.path().join("run"),
            nft_table: format!("trenv_test_{pid}_{number}"),
        };
        Self { dir, config }
    }

    fn open(&self) -> Network {
        Network::open(&self.config).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Ok(network) = Network::open(&self.config) else {
            return;
        };
        network.sweep().unwrap();
        network.remove().unwrap();
        assert!(
            !Path::new("/sys/class/net")
                .join(&self.config.bridge)
                .exists()
        );
        assert_eq!(mounts_below(self.dir.path()), 0);
    }
}

fn mounts_below(dir: &Path) -> usize {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines()
        .filter(|line| line.contains(dir.to_str().unwrap()))
        .count()
}

/// Runs a command in a namespace and answers its output.
fn inside(netns: &Path, command: &[&str]) -> String {
    let output = Command::new("nsenter")
        .arg(format!("--net={}", netns.display()))
        .args(command)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs something in a namespace, on a thread of its own.
fn at<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> T {
    let netns = fs::File::open(netns).unwrap();
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                work()
            })
            .join()
            .unwrap()
    })
}

fn connects(from: &Path, to: &TcpListener) {
    let address = to.local_addr().unwrap();
    let limit = Duration::from_secs(3);
    at(from, || {
        TcpStream::connect_timeout(&address, limit).unwrap()
    });
}

fn addresses(config: &NetworkConfig) -> usize {
    let dir: PathBuf = config
        .state_dir
        .join("network/addresses")
        .join(&config.bridge);
    fs::read_dir(dir)
        .map(|entries| {
            entries
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .filter(|name| name.starts_with("10."))
                .count()
        })
        .unwrap_or(0)
}

#[test]
fn a_namespace_has_an_address_a_route_and_loopback() {
    let place = Place::new();
    let network = place.open();
    let netns = network.create("one").unwrap();
    let address = netns.address().to_string();
    assert_ne!(netns.address(), netns.gateway());
    let shown = inside(netns.path(), &["ip", "-o", "address"]);
    assert!(
        shown.contains(&format!("eth0    inet {address}/24")),
        "{shown}"
    );
    assert!(shown.contains("127.0.0.1/8"), "{shown}");
    assert!(!shown.contains("fe80"), "{shown}");
    let route = inside(netns.path(), &["ip", "route"]);
    assert!(
        route.contains(&format!("default via {}", netns.gateway())),
        "{route}"
    );
    let gateway = TcpListener::bind((netns.gateway(), 0)).unwrap();
    connects(netns.path(), &gateway);
    let own = at(netns.path(), || {
        TcpListener::bind((netns.address(), 0)).unwrap()
    });
    let limit = Duration::from_secs(3);
    TcpStream::connect_timeout(&own.local_addr().unwrap(), limit).unwrap();
    let known = inside(netns.path(), &["ip", "neighbour"]);
    assert!(known.contains("PERMANENT"), "{known}");
    let bridge = &place.config.bridge;
    let shown = ["neighbour", "show", "dev", bridge];
    let known = || Command::new("ip").args(shown).output().unwrap().stdout;
    let text = String::from_utf8(known()).unwrap();
    assert!(
        text.contains(&address) && text.contains("PERMANENT"),
        "{text}"
    );
    assert!(netns.steps().iter().any(|step| step.name == "plugins"));
    assert!(matches!(
        network.create("one"),
        Err(NetworkError::Taken { .. })
    ));
    assert!(matches!(
        network.remove(),
        Err(NetworkError::InUse { left: 1 })
    ));
    netns.destroy().unwrap();
    netns.destroy().unwrap();
    assert!(!netns.path().exists());
    assert_eq!(addresses(&place.config), 0);
    assert_eq!(String::from_utf8(known()).unwrap(), "");
}

#[test]
fn two_namespaces_reach_each_other() {
    let place = Place::new();
    let network = place.open();
    let (a, b) = (network.create("a").unwrap(), network.create("b").unwrap());
    assert_ne!(a.address(), b.address());
    let listener = at(b.path(), || TcpListener::bind((b.address(), 0)).unwrap());
    connects(a.path(), &listener);
    a.destroy().unwrap();
    b.destroy().unwrap();
}

#[test]
fn the_pool_is_filled_and_drained() {
    let place = Place::new();
    let pool = NetnsPool::new(place.open(), 2);
    assert_eq!(pool.refill().unwrap(), 2);
    let taken = pool.take().unwrap();
    assert_eq!(pool.ready(), 1);
    pool.give_back(taken);
    assert_eq!(pool.refill().unwrap(), 0);
    pool.drain().unwrap();
    assert_eq!(pool.refill().unwrap(), 0, "a drained pool stays so");
    assert_eq!(pool.ready(), 0);
    let made_now = pool.take().unwrap();
    made_now.destroy().unwrap();
    assert_eq!(addresses(&place.config), 0);
}

#[test]
fn a_sweep_takes_back_what_has_no_owner_only() {
    let place = Place::new();
    let network = place.open();
    let kept = network.create("kept").unwrap();
    let lost = network.create("lost").unwrap();
    let lost_path = lost.path().to_owned();
    drop(lost);
    assert_eq!(network.sweep().unwrap(), 1);
    assert!(!lost_path.exists());
    assert!(kept.path().exists());
    assert_eq!(addresses(&place.config), 1);
    // After a reboot the record and the address are there, the namespace is not.
    let path = kept.path().to_owned();
    nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH).unwrap();
    drop(kept);
    assert_eq!(network.sweep().unwrap(), 1);
    assert_eq!(addresses(&place.config), 0);
    assert_eq!(network.sweep().unwrap(), 0);
}

#[test]
fn a_failed_creation_leaves_nothing() {
    let place = Place::new();
    let network = place.open();
    let wrong = NetworkConfig {
        // Longer than an interface's name may be.
        bridge: "a-name-that-is-too-long".into(),
        ..place.config.clone()
    };
    let broken = Network::open(&wrong).unwrap();
    let error = broken.create("x").unwrap_err();
    assert!(error.to_string().contains("bridge"), "{error}");
    assert_eq!(mounts_below(place.dir.path()), 0);
    assert_eq!(network.sweep().unwrap(), 0);
}

#[test]
fn masquerade_is_one_table_of_ours() {
    let place = Place::new();
    let _network = place.open();
    let _again = place.open();
    let table = &place.config.nft_table;
    let output = Command::new("nft")
        .args(["list", "table", "ip", table])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("masquerade").count(), 1, "{text}");
    assert!(text.contains(&place.config.subnet), "{text}");
}

#[test]
fn wrong_settings_are_named() {
    let place = Place::new();
    let with = |change: &dyn Fn(&mut NetworkConfig)| {
        let mut config = place.config.clone();
        change(&mut config);
        Network::open(&config).unwrap_err().to_string()
    };
    assert!(with(&|c| c.subnet = "10.0.0.1/16".into()).contains("10.0.0.1/16"));
    assert!(with(&|c| c.subnet = "nonsense".into()).contains("nonsense"));
    assert!(with(&|c| c.plugin_dir = "/nonexistent".into()).contains("/nonexistent"));
    assert!(with(&|c| c.nft_table = "a;b".into()).contains("a;b"));
}

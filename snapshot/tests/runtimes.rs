//! Restores what runtimes and servers build: threads, event loops, children, timers. Needs root.
//!
//! Each program answers "COUNT TICKS ok": how often it was asked, what its timers counted, and what
//! it found when it checked its own state.

#![allow(clippy::unwrap_used)]

mod harness;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use harness::{Bed, Instance, TestResult};
use trenv_snapshot::methods::Method;

type Made<T> = Result<T, Box<dyn std::error::Error>>;
type Ask = fn(&mut Instance) -> Made<String>;

/// A program's own account.
#[derive(Debug)]
struct Seen {
    count: u64,
    ticks: f64,
}

fn by_line(instance: &mut Instance) -> Made<String> {
    instance.tell("check");
    let begun = Instant::now();
    while !instance.has_answered() {
        if begun.elapsed() > Duration::from_secs(10) {
            return Err("no answer".into());
        }
    }
    Ok(instance.answer())
}

fn by_http(instance: &mut Instance) -> Made<String> {
    instance.get("/")
}

/// Counts, keeps a list and a key that ends in 20 ms; checks them, a hash and a key that stays.
/// Keys that Redis finds to be over by itself are its ticks.
fn by_redis(instance: &mut Instance) -> Made<String> {
    const SCRIPT: &str = "\
        local n = redis.call('INCR', 'count') \
        if n == 1 then \
            redis.call('SET', 'far', 'x', 'EX', 3600) \
            for i = 1, 20000 do redis.call('HSET', 'hash', 'field' .. i, 'value' .. i) end \
        end \
        redis.call('RPUSH', 'list', n) \
        redis.call('SET', 'gone' .. n, 'x', 'PX', 20) \
        local sum = 0 \
        for _, i in ipairs(redis.call('LRANGE', 'list', 0, -1)) do sum = sum + i end \
        local verdict = 'ok' \
        if sum ~= n * (n + 1) / 2 then verdict = 'the list' end \
        if redis.call('TTL', 'far') < 3000 then verdict = 'the key that stays' end \
        for i = 1, 20000 do \
            if redis.call('HGET', 'hash', 'field' .. i) ~= 'value' .. i then verdict = 'the hash' end \
        end \
        local over = string.match(redis.call('INFO', 'stats'), 'expired_keys:(%d+)') \
        return n .. ' ' .. over .. ' ' .. verdict";
    instance.talk(&format!("EVAL \"{SCRIPT}\" 0\r\nQUIT\r\n"))
}

/// Asks, and takes the line with the program's account from its answer.
fn seen(instance: &mut Instance, ask: Ask) -> Made<Seen> {
    let answer = ask(instance)?;
    let account = answer.lines().find_map(|line| {
        let line = line.strip_prefix("X-Account: ").unwrap_or(line);
        let mut words = line.splitn(3, ' ');
        let count = words.next()?.parse().ok()?;
        let ticks = words.next()?.parse().ok()?;
        Some((Seen { count, ticks }, words.next()?.trim_end().to_owned()))
    });
    let (seen, verdict) = account.ok_or(format!("no account in {answer:?}"))?;
    assert_eq!(verdict, "ok", "{seen:?}");
    Ok(seen)
}

/// Asks until the timers have gone on; every request counts.
fn ticks_on(instance: &mut Instance, ask: Ask, mut last: Seen) -> Made<Seen> {
    let begun = Instant::now();
    loop {
        let now = seen(instance, ask)?;
        assert_eq!(now.count, last.count + 1, "requests were not counted");
        if now.ticks > last.ticks {
            return Ok(now);
        }
        assert!(begun.elapsed() < Duration::from_secs(4), "no timer runs");
        last.count = now.count;
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Dumps a running program, and holds two instances beside each other to what it knew, and one by
/// each of the methods.
fn goes_on(bed: &Bed, mut first: Instance, ask: Ask, methods: &[Method]) -> Made<Vec<Instance>> {
    let begun = seen(&mut first, ask)?;
    let before = ticks_on(&mut first, ask, begun)?;
    let template = bed.dump(first)?;
    let zygote = bed.zygote(&template)?;
    let mut agent = zygote.agent()?;
    let mut instances = vec![bed.start(&mut agent)?, bed.start(&mut agent)?];
    for instance in &mut instances {
        let mut now = seen(instance, ask)?;
        assert_eq!(now.count, before.count + 1, "each goes on by itself");
        assert!(now.ticks >= before.ticks, "{now:?} after {before:?}");
        for _ in 0..3 {
            now = ticks_on(instance, ask, now)?;
        }
    }
    for &method in methods {
        let prepared = bed.prepare(method, &template)?;
        let mut instance = bed.start_with(prepared.as_ref())?;
        let now = seen(&mut instance, ask).map_err(|err| format!("{method}: {err}"))?;
        assert_eq!(now.count, before.count + 1, "{method}");
        ticks_on(&mut instance, ask, now).map_err(|err| format!("{method}: {err}"))?;
    }
    // A restored program is dumped like any other.
    let mut again = instances.swap_remove(0);
    let before = seen(&mut again, ask)?;
    let zygote = bed.zygote(&bed.dump(again)?)?;
    let mut third = bed.start(&mut zygote.agent()?)?;
    let now = ticks_on(&mut third, ask, before)?;
    ticks_on(&mut third, ask, now)?;
    instances.push(third);
    Ok(instances)
}

fn program(name: &str) -> String {
    let tests = env!("CARGO_MANIFEST_DIR");
    format!("{tests}/tests/programs/runtimes/{name}")
}

fn answers_lines(command: &[&str]) -> TestResult {
    let bed = Bed::new()?;
    let first = bed.run(command)?;
    goes_on(&bed, first, by_line, &harness::methods())?;
    Ok(())
}

fn answers_http(bed: &Bed, command: &[&str], environment: &[(&str, &str)]) -> TestResult {
    let first = bed.serve(command, environment)?;
    goes_on(bed, first, by_http, &harness::methods())?;
    Ok(())
}

#[test]
fn python_asyncio() -> TestResult {
    let server = program("asyncio_server.py");
    answers_http(&Bed::new()?, &["/usr/bin/python3", &server], &[])
}

#[test]
fn python_threads() -> TestResult {
    answers_lines(&["/usr/bin/python3", &program("threads.py")])
}

#[test]
fn python_subprocesses() -> TestResult {
    answers_lines(&["/usr/bin/python3", &program("pipes.py")])
}

/// What `tests/shared.rs` does not have: a server that forks, managed objects, an executor.
#[test]
fn python_multiprocessing_with_a_manager() -> TestResult {
    // Its sockets lie where instances do not see each other's.
    let place = "TMPDIR=/dev/shm";
    answers_lines(&["env", place, "/usr/bin/python3", &program("manager.py")])
}

#[test]
fn python_numpy() -> TestResult {
    answers_lines(&["/usr/bin/python3", &program("arrays.py")])
}

#[test]
fn node_worker_threads() -> TestResult {
    answers_lines(&["/usr/bin/node", &program("workers.js")])
}

#[test]
fn node_with_sockets_watches_and_streams() -> TestResult {
    answers_lines(&["/usr/bin/node", &program("sockets.js")])
}

/// Its rings cannot be read back from the kernel; sandboxes answer that there are none.
#[test]
fn node_with_io_uring_is_refused_by_name() -> TestResult {
    let bed = Bed::new()?;
    let file = program("workers.js");
    let mut instance = bed.run(&["env", "UV_USE_IO_URING=1", "/usr/bin/node", &file])?;
    let before = seen(&mut instance, by_line)?;
    let err = bed.try_dump(&instance).err().ok_or("it was not refused")?;
    assert!(err.to_string().contains("io_uring"), "{err}");
    assert_eq!(seen(&mut instance, by_line)?.count, before.count + 1);
    Ok(())
}

#[test]
fn node_cluster() -> TestResult {
    let server = program("cluster.js");
    answers_http(&Bed::new()?, &["/usr/bin/node", &server], &[])
}

#[test]
fn go() -> TestResult {
    let bed = Bed::new()?;
    let server = bed.build_go(&program("go"))?;
    answers_http(&bed, &[&server], &[])
}

#[test]
fn rust_tokio() -> TestResult {
    let beside = Path::new(env!("CARGO_BIN_EXE_trenv-zygote"));
    let server = beside.with_file_name("examples").join("tokio_server");
    assert!(
        server.exists(),
        "build it first: cargo build -p trenv-snapshot --example tokio_server"
    );
    answers_http(&Bed::new()?, &[&server.display().to_string()], &[])
}

#[test]
fn ruby() -> TestResult {
    let server = program("server.rb");
    answers_http(&Bed::new()?, &["/usr/bin/ruby", &server], &[])
}

#[test]
fn ruby_with_its_compiler() -> TestResult {
    let server = program("server.rb");
    let command = [
        "/usr/bin/ruby",
        "--yjit",
        "--yjit-call-threshold=1",
        "--yjit-exec-mem-size=8",
        &server,
    ];
    let bed = Bed::new()?;
    let first = bed.serve(&command, &[])?;
    goes_on(&bed, first, by_http, &[])?;
    Ok(())
}

#[test]
fn php_server_with_workers() -> TestResult {
    let server = [
        "/usr/bin/php",
        "-S",
        "127.0.0.1:8080",
        &program("router.php"),
    ];
    answers_http(&Bed::new()?, &server, &[("PHP_CLI_SERVER_WORKERS", "2")])
}

#[test]
fn php_script() -> TestResult {
    answers_lines(&["/usr/bin/php", &program("script.php")])
}

/// A configuration with two workers, in a directory that they may read. Without a server of PHP's
/// own to ask, they count connections in memory that they share; requests in a row wait for a timer.
fn nginx(bed: &Bed, daemon: &str, php: Option<&str>) -> Made<String> {
    let directory = bed.directory();
    std::fs::set_permissions(directory, PermissionsExt::from_mode(0o755))?;
    std::fs::write(directory.join("index.html"), "served\n")?;
    let path = directory.display();
    let answer = match php {
        None => "add_header X-Account \"$connection $msec ok\";".to_owned(),
        Some(socket) => format!(
            "location / {{
                include /etc/nginx/fastcgi_params;
                fastcgi_param SCRIPT_FILENAME {path}/router.php;
                fastcgi_pass unix:{socket};
            }}"
        ),
    };
    let configuration = format!(
        "daemon {daemon}; user www-data; worker_processes 2; pid {path}/nginx.pid; error_log {path}/error.log;
        events {{ worker_connections 64; }}
        http {{
            access_log {path}/access.log;
            keepalive_timeout 0;
            limit_req_zone $server_port zone=all:1m rate=200r/s;
            server {{
                listen 127.0.0.1:8080;
                root {path};
                limit_req zone=all burst=10;
                {answer}
            }}
        }}"
    );
    let file = directory.join("nginx.conf");
    std::fs::write(&file, configuration)?;
    Ok(file.display().to_string())
}

#[test]
fn nginx_in_the_foreground() -> TestResult {
    let bed = Bed::new()?;
    let configuration = nginx(&bed, "off", None)?;
    let first = bed.serve(&["/usr/sbin/nginx", "-c", &configuration], &[])?;
    for mut instance in goes_on(&bed, first, by_http, &harness::methods())? {
        // The master makes other workers when it is told to read its configuration again.
        let before = instance.children();
        assert_eq!(before.len(), 2);
        let master = nix::unistd::Pid::from_raw(instance.root);
        nix::sys::signal::kill(master, nix::sys::signal::Signal::SIGHUP)?;
        let begun = Instant::now();
        while instance.children().len() != 2
            || instance.children().iter().any(|pid| before.contains(pid))
        {
            assert!(begun.elapsed() < Duration::from_secs(5), "no reload");
            std::thread::sleep(Duration::from_millis(10));
        }
        seen(&mut instance, by_http)?;
    }
    Ok(())
}

#[test]
fn nginx_as_a_daemon() -> TestResult {
    let bed = Bed::new()?;
    let start = format!("nginx -c {}; exec cat", nginx(&bed, "on", None)?);
    let first = bed.serve(&["sh", "-c", &start], &[])?;
    goes_on(&bed, first, by_http, &[])?;
    Ok(())
}

/// PHP's processes listen at a socket in a tmpfs that only nginx's workers may connect to, share
/// compiled scripts by memory, and are made and ended by their master.
#[test]
fn php_fpm_behind_nginx() -> TestResult {
    let bed = Bed::new()?;
    let socket = "/dev/shm/php/socket";
    let server = nginx(&bed, "off", Some(socket))?;
    let path = bed.directory().display();
    std::fs::copy(program("router.php"), bed.directory().join("router.php"))?;
    let configuration = format!(
        "[global]\nerror_log = {path}/php.log\n[www]\nuser = www-data\ngroup = www-data\n\
        listen = {socket}\nlisten.owner = www-data\nlisten.mode = 0600\npm = dynamic\n\
        pm.max_children = 4\npm.start_servers = 2\npm.min_spare_servers = 1\n\
        pm.max_spare_servers = 2\npm.max_requests = 4\n"
    );
    std::fs::write(bed.directory().join("php.conf"), configuration)?;
    let start = format!(
        "mkdir /dev/shm/php; php-fpm8.2 -F -y {path}/php.conf & \
        while [ ! -e {socket} ]; do sleep 0.01; done; exec nginx -c {server}"
    );
    answers_http(&bed, &["sh", "-c", &start], &[])
}

#[test]
fn redis() -> TestResult {
    let bed = Bed::new()?;
    let command = [
        "/usr/bin/redis-server",
        "--port 8080",
        "--bind 127.0.0.1",
        "--save \"\"",
        "--io-threads 2",
        "--appendonly yes",
        "--appendfsync everysec",
        "--unixsocket /dev/shm/redis",
        "--dir /dev/shm",
    ];
    let words: Vec<&str> = command.iter().flat_map(|part| part.split(' ')).collect();
    let first = bed.run(&words)?;
    let begun = Instant::now();
    while !first
        .talk("PING\r\nQUIT\r\n")
        .is_ok_and(|answer| answer.starts_with("+PONG"))
    {
        assert!(begun.elapsed() < Duration::from_secs(10), "no answer");
        std::thread::sleep(Duration::from_millis(10));
    }
    for mut instance in goes_on(&bed, first, by_redis, &harness::methods())? {
        let answer = instance.talk("BGREWRITEAOF\r\nQUIT\r\n")?;
        assert!(answer.starts_with("+Background append"), "{answer}");
        let begun = Instant::now();
        while instance
            .talk("INFO persistence\r\nQUIT\r\n")?
            .contains("aof_rewrite_in_progress:1")
        {
            assert!(begun.elapsed() < Duration::from_secs(5), "no rewriting");
            std::thread::sleep(Duration::from_millis(10));
        }
        // A child of its own saves the data.
        let answer = instance.talk("BGSAVE\r\nQUIT\r\n")?;
        assert!(answer.starts_with("+Background saving started"), "{answer}");
        let begun = Instant::now();
        while !instance
            .talk("INFO persistence\r\nQUIT\r\n")?
            .contains("rdb_bgsave_in_progress:0\r\nrdb_last_save_time")
        {
            assert!(
                begun.elapsed() < Duration::from_secs(5),
                "it saves for ever"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let saved = instance.talk("INFO persistence\r\nQUIT\r\n")?;
        for kind in ["rdb_last_bgsave", "aof_last_bgrewrite", "aof_last_write"] {
            assert!(saved.contains(&format!("{kind}_status:ok")), "{saved}");
        }
        seen(&mut instance, by_redis)?;
    }
    Ok(())
}

fn java(collector: &str, methods: &[Method]) -> TestResult {
    let bed = Bed::new()?;
    let classes = bed.directory().display().to_string();
    let status = Command::new("javac")
        .args(["-d", &classes, &program("Server.java")])
        .status()?;
    assert!(status.success(), "Server.java does not compile");
    let flags = [&format!("-XX:+Use{collector}GC"), "-Xmx256m", "-cp"];
    let command = [&["/usr/bin/java"][..], &flags, &[&classes, "Server"]].concat();
    let first = bed.serve(&command, &[])?;
    goes_on(&bed, first, by_http, methods)?;
    Ok(())
}

#[test]
fn java_with_g1() -> TestResult {
    java("G1", &harness::methods())
}

#[test]
fn java_with_the_serial_collector() -> TestResult {
    java("Serial", &[])
}

#[test]
fn java_with_the_parallel_collector() -> TestResult {
    java("Parallel", &[])
}

#[test]
fn java_with_shenandoah() -> TestResult {
    java("Shenandoah", &[])
}

/// Its heap is a memfd that is mapped three times.
#[test]
fn java_with_zgc() -> TestResult {
    java("Z", &[Method::Copy])
}

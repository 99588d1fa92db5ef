//! A containerd, a stand-in for the shim and a provider, for the cases.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use axum::body::Body;
use base64::Engine;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{image, stand_in};

pub const NAMESPACE: &str = "openfaas-fn";
const GATEWAY: &str = "127.0.0.1:9080";

/// A reply, read whole.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |v| v.to_str().unwrap_or(""))
    }
}

pub struct Machine {
    directory: TempDir,
    containerd: Child,
    provider: Child,
    _shim: ttrpc::r#async::Server,
    client: Client<HttpConnector, Body>,
}

impl Machine {
    pub async fn start() -> Self {
        let directory = tempfile::Builder::new()
            .prefix("trenv-rest-")
            .tempdir()
            .unwrap();
        let dir = directory.path();
        let bin = dir.join("bin");
        std::fs::create_dir_all(&bin).unwrap();
        stand_in::write_program(&bin);
        let socket = dir.join("c.sock");
        std::fs::write(
            dir.join("containerd.toml"),
            format!(
                "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
                 [grpc]\naddress = {socket:?}\n",
                dir.join("root"),
                dir.join("state")
            ),
        )
        .unwrap();
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        let containerd = Command::new("containerd")
            .arg("--config")
            .arg(dir.join("containerd.toml"))
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(log(dir, "containerd"))
            .stderr(log(dir, "containerd"))
            .spawn()
            .unwrap();
        wait_for("containerd", || ctr(&socket, &["version"]).is_some()).await;
        for (name, user) in [("function", ""), ("user", "app")] {
            let archive = image::build(dir, name, user);
            let archive = archive.display().to_string();
            // The second image is left packed: the provider unpacks it.
            let mut arguments = vec!["images", "import"];
            arguments.extend((name == "user").then_some("--no-unpack"));
            arguments.push(&archive);
            ctr(&socket, &arguments).unwrap_or_else(|| panic!("{name} was not imported"));
        }
        let shim = stand_in::serve(&dir.join("run"), &socket, NAMESPACE).await;
        let secrets = dir.join("auth");
        std::fs::create_dir_all(&secrets).unwrap();
        std::fs::write(secrets.join("basic-auth-user"), "admin\n").unwrap();
        std::fs::write(secrets.join("basic-auth-password"), "secret\n").unwrap();
        std::fs::write(
            dir.join("trenv.toml"),
            format!(
                "state_dir = {:?}\nrun_dir = {:?}\n[containerd]\naddress = {socket:?}\n\
                 [provider]\nlisten = {GATEWAY:?}\nsecrets_dir = {secrets:?}\nidle_sandboxes = 0\n\
                 max_sandboxes = 1\nready_timeout_s = 10\ncall_timeout_s = 5\n",
                dir.join("lib"),
                dir.join("run")
            ),
        )
        .unwrap();
        let provider = start_provider(dir);
        let machine = Self {
            directory,
            containerd,
            provider,
            _shim: shim,
            client: Client::builder(TokioExecutor::new()).build_http(),
        };
        machine.up().await;
        machine
    }

    async fn up(&self) {
        let begun = Instant::now();
        while self
            .send(Method::GET, "/healthz", &[], Body::empty())
            .await
            .is_err()
        {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "{}",
                self.last_words()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Ends the provider by `signal` and starts another one.
    pub async fn restart_provider(&mut self, signal: Signal) {
        kill(Pid::from_raw(self.provider.id() as i32), signal).unwrap();
        self.provider.wait().unwrap();
        self.provider = start_provider(self.directory.path());
        self.up().await;
    }

    /// Runs a second provider on the same state and returns what it says.
    pub fn second_provider(&self) -> (bool, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_trenv-provider"))
            .arg("--config")
            .arg(self.directory.path().join("trenv.toml"))
            .output()
            .unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    pub fn ctr(&self, arguments: &[&str]) -> Option<String> {
        ctr(&self.directory.path().join("c.sock"), arguments)
    }

    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Body,
    ) -> Result<Reply, String> {
        let (head, mut body) = self.open(method, path, headers, body).await?.into_parts();
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|err| err.to_string())?;
            bytes.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
        }
        Ok(Reply {
            status: head.status,
            headers: head.headers,
            body: bytes.into(),
        })
    }

    /// Sends a request and returns when the reply's head is there.
    pub async fn open(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Body,
    ) -> Result<http::Response<hyper::body::Incoming>, String> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{GATEWAY}{path}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(body).map_err(|err| err.to_string())?;
        self.client
            .request(request)
            .await
            .map_err(|err| format!("{path}: {err:?}"))
    }

    /// Opens a system route and returns the reply's body as it comes.
    pub async fn follow(&self, path: &str) -> Result<hyper::body::Incoming, String> {
        let login = login();
        let headers = [("authorization", login.as_str())];
        Ok(self
            .open(Method::GET, path, &headers, Body::empty())
            .await?
            .into_body())
    }

    /// A request to a system route, with the credentials.
    pub async fn system(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<Reply, String> {
        let login = login();
        let body = body.map_or_else(Body::empty, |b| Body::from(b.to_string()));
        self.send(method, path, &[("authorization", &login)], body)
            .await
    }

    pub async fn call(&self, path: &str) -> Result<Reply, String> {
        self.send(
            Method::GET,
            &format!("/function/{path}"),
            &[],
            Body::empty(),
        )
        .await
    }

    /// Deploys a function and waits until it is no longer being built.
    pub async fn deploy(&self, deployment: Value) -> Result<Value, String> {
        let name = deployment["service"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let reply = self
            .system(Method::POST, "/system/functions", Some(deployment))
            .await?;
        if reply.status != StatusCode::ACCEPTED {
            return Err(format!("{} {}", reply.status, reply.text()));
        }
        self.settled(&name).await
    }

    pub async fn settled(&self, name: &str) -> Result<Value, String> {
        let begun = Instant::now();
        loop {
            let path = format!("/system/function/{name}");
            let status = self.system(Method::GET, &path, None).await?.json();
            if status["status"] != "building" && status.get("update") != Some(&json!("building")) {
                return Ok(status);
            }
            if begun.elapsed() > Duration::from_secs(30) {
                return Err(format!("still building: {status}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn remove_everything(&self) {
        let listed = self.system(Method::GET, "/system/functions", None).await;
        let listed = listed.map(|reply| reply.json()).unwrap_or_default();
        for function in listed.as_array().into_iter().flatten() {
            let body = json!({ "functionName": function["name"] });
            let _ = self
                .system(Method::DELETE, "/system/functions", Some(body))
                .await;
        }
        // The stand-in cannot reset, so every sandbox ends with its function.
        let begun = Instant::now();
        loop {
            let containers = self
                .ctr(&["containers", "ls", "--quiet"])
                .unwrap_or_default();
            if containers.trim().is_empty() {
                return;
            }
            if begun.elapsed() > Duration::from_secs(20) {
                println!("    containers stay: {containers}");
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn last_words(&self) -> String {
        let text = std::fs::read_to_string(self.directory.path().join("provider.log"));
        text.unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for child in [&mut self.provider, &mut self.containerd] {
            let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

fn login() -> String {
    let login = base64::engine::general_purpose::STANDARD.encode("admin:secret");
    format!("Basic {login}")
}

fn start_provider(directory: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_trenv-provider"))
        .arg("--config")
        .arg(directory.join("trenv.toml"))
        .stdin(Stdio::null())
        .stdout(log(directory, "provider"))
        .stderr(log(directory, "provider"))
        .spawn()
        .unwrap()
}

fn log(directory: &Path, name: &str) -> std::fs::File {
    let path = directory.join(format!("{name}.log"));
    std::fs::File::options()
        .create(true)
        .append(true)
        .open(path)
        .unwrap()
}

fn ctr(socket: &PathBuf, arguments: &[&str]) -> Option<String> {
    let output = Command::new("ctr")
        .arg("--address")
        .arg(socket)
        .args(["--namespace", NAMESPACE])
        .args(arguments)
        .output()
        .unwrap();
    if !output.status.success() {
        return None;
    }
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn wait_for(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{what} does not answer"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

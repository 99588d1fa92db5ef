//! A stand-in for the shim: containers run by runc in the test's network, and a Sandbox service
//! that knows their address but can neither dump nor hand over.

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use async_trait::async_trait;
use trenv_sandbox_proto as proto;
use ttrpc::r#async::{Server, TtrpcContext};

/// Why the stand-in refuses to dump, as a real shim names what it cannot capture.
pub const REFUSAL: &str = "fd 7 is a raw socket, which cannot be captured";

/// Writes the program that containerd starts as the shim: runc's, without a network of its own.
pub fn write_program(directory: &Path) {
    let path = directory.join("containerd-shim-trenv-v2");
    let text = "#!/bin/sh\n\
        case \" $* \" in *\" start \"*)\n\
        jq 'del(.linux.namespaces[] | select(.type == \"network\"))' config.json >config.new &&\n\
        mv config.new config.json ;;\n\
        esac\n\
        exec containerd-shim-runc-v2 \"$@\"\n";
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

struct Service {
    containerd: PathBuf,
    namespace: String,
}

#[async_trait]
impl proto::Sandbox for Service {
    async fn version(
        &self,
        _: &TtrpcContext,
        _: proto::VersionRequest,
    ) -> ttrpc::Result<proto::VersionResponse> {
        let mut answer = proto::VersionResponse::new();
        answer.protocol = 1;
        answer.fingerprint = "test".to_owned();
        Ok(answer)
    }

    async fn list(
        &self,
        _: &TtrpcContext,
        _: proto::ListRequest,
    ) -> ttrpc::Result<proto::ListResponse> {
        let ctr = |what: &str| {
            let output = Command::new("ctr")
                .arg("--address")
                .arg(&self.containerd)
                .args(["--namespace", &self.namespace, what, "ls", "--quiet"])
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let running: HashSet<String> = ctr("task").lines().map(str::to_owned).collect();
        let mut answer = proto::ListResponse::new();
        for id in running {
            let mut info = proto::SandboxInfo::new();
            info.id = id;
            info.state = proto::State::DEAD.into();
            info.address = "127.0.0.1".to_owned();
            answer.sandboxes.push(info);
        }
        Ok(answer)
    }

    async fn snapshot(
        &self,
        _: &TtrpcContext,
        _: proto::SnapshotRequest,
    ) -> ttrpc::Result<proto::SnapshotResponse> {
        let status = ttrpc::get_status(ttrpc::Code::UNIMPLEMENTED, REFUSAL);
        Err(ttrpc::Error::RpcStatus(status))
    }
}

/// Serves until the returned server is dropped.
pub async fn serve(run_dir: &Path, containerd: &Path, namespace: &str) -> Server {
    let directory = run_dir.join("shim");
    std::fs::create_dir_all(&directory).unwrap();
    let address = format!("unix://{}", directory.join("s.sock").display());
    std::fs::write(directory.join(format!("{namespace}.address")), &address).unwrap();
    let service = Service {
        containerd: containerd.to_owned(),
        namespace: namespace.to_owned(),
    };
    let mut server = Server::new()
        .bind(&address)
        .unwrap()
        .register_service(proto::create_sandbox(Arc::new(service)));
    server.start().await.unwrap();
    server
}

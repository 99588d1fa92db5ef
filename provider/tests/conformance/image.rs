//! An OCI image of this very program, which is static.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Writes `NAME.tar`, an image whose process serves the function, and returns its path. `user` is
/// the image's user, looked up in an /etc/passwd of its own in a second layer.
pub fn build(directory: &Path, name: &str, user: &str) -> PathBuf {
    let work = directory.join(format!("image-{name}"));
    let blobs = work.join("oci/blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let program = work.join("one");
    fs::create_dir_all(program.join("tmp")).unwrap();
    fs::copy(std::env::current_exe().unwrap(), program.join("function")).unwrap();
    let users = work.join("two");
    fs::create_dir_all(users.join("etc")).unwrap();
    fs::write(users.join("etc/passwd"), "app:x:1234:1234::/:/none\n").unwrap();
    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    for tree in [&program, &users] {
        let file = work.join("layer.tar");
        tar(&file, tree);
        let descriptor = blob(
            &blobs,
            &fs::read(&file).unwrap(),
            "application/vnd.oci.image.layer.v1.tar",
        );
        diff_ids.push(descriptor["digest"].clone());
        layers.push(descriptor);
    }
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Entrypoint": ["/function"], "Cmd": ["serve-function"], "User": user,
            "Env": ["FROM_IMAGE=yes"], "WorkingDir": "/tmp",
        },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = blob(
        &blobs,
        config.to_string().as_bytes(),
        "application/vnd.oci.image.config.v1+json",
    );
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": layers,
    });
    let mut manifest = blob(
        &blobs,
        manifest.to_string().as_bytes(),
        "application/vnd.oci.image.manifest.v1+json",
    );
    manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    manifest["annotations"] =
        json!({ "io.containerd.image.name": format!("docker.io/test/{name}:latest") });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(work.join("oci/index.json"), index.to_string()).unwrap();
    fs::write(
        work.join("oci/oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    let archive = directory.join(format!("{name}.tar"));
    tar(&archive, &work.join("oci"));
    fs::remove_dir_all(&work).unwrap();
    archive
}

fn tar(file: &Path, tree: &Path) {
    let status = Command::new("tar")
        .args(["--create", "--owner=0", "--group=0", "--file"])
        .arg(file)
        .arg("--directory")
        .arg(tree)
        .arg(".")
        .status();
    assert!(status.unwrap().success());
}

fn blob(blobs: &Path, bytes: &[u8], kind: &str) -> Value {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    fs::write(blobs.join(&hex), bytes).unwrap();
    json!({ "mediaType": kind, "digest": format!("sha256:{hex}"), "size": bytes.len() })
}

//! Images and functions of a test's own: a sample image with another configuration.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::images;
use crate::machine::Machine;

/// Where [`Machine::variant`] puts its images; they go with the machine.
pub(crate) const VARIANTS: &str = "docker.io/trenv-test/";

/// The source of a function that does what no sample does; see its text.
pub const SERVER: &str = include_str!("../functions/server.py");

impl Machine {
    /// Imports a sample's image once more, with its configuration changed; returns the new name.
    ///
    /// # Errors
    /// When the sample's image is not there, or containerd does not take the new one.
    pub fn variant(
        &self,
        sample: &str,
        name: &str,
        change: impl FnOnce(&mut Value),
    ) -> anyhow::Result<String> {
        let layout = tempfile::tempdir()?;
        let file = images::directory().join(format!("{sample}.tar"));
        run(Command::new("tar")
            .arg("-C")
            .arg(layout.path())
            .arg("-xf")
            .arg(&file))?;
        let image = format!("{VARIANTS}{name}:latest");
        rewrite(layout.path(), &image, change)
            .with_context(|| format!("{} is no image as expected", file.display()))?;
        let variant = layout.path().join("variant.tar");
        run(Command::new("tar")
            .arg("-C")
            .arg(layout.path())
            .arg("-cf")
            .arg(&variant)
            .args(["oci-layout", "index.json", "blobs"]))?;
        self.ctr(&["images", "import", &variant.display().to_string()])?;
        Ok(image)
    }

    /// The image of [`SERVER`], which listens on port 8080 itself.
    ///
    /// # Errors
    /// As [`Machine::variant`].
    pub fn server_image(&self) -> anyhow::Result<String> {
        self.variant("hello-python", "server", |config| {
            config["Cmd"] = json!(["python3", "-c", SERVER]);
        })
    }

    /// Deploys what `body` says and waits until it is no longer being built.
    ///
    /// # Errors
    /// When the gateway does not accept it, or it takes too long.
    pub fn deploy_as(&self, body: &Value) -> anyhow::Result<Value> {
        let reply = self.request("POST", "/system/functions", Some(body))?;
        if !matches!(reply.status, 200 | 202) {
            bail!("{body} was not accepted: {} {}", reply.status, reply.text());
        }
        self.settled(body["service"].as_str().unwrap_or_default())
    }
}

/// Changes the image of a layout and names it.
fn rewrite(layout: &Path, image: &str, change: impl FnOnce(&mut Value)) -> anyhow::Result<()> {
    let blob = |digest: &Value| {
        let digest = digest.as_str().unwrap_or_default();
        layout.join("blobs").join(digest.replace(':', "/"))
    };
    let read = |path: &Path| -> anyhow::Result<Value> {
        let text = fs::read(path).with_context(|| format!("Failed to read {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    };
    // Writes a document and has its descriptor name it.
    let write = |descriptor: &mut Value, document: &Value| -> anyhow::Result<()> {
        let bytes = document.to_string();
        let digest = format!("{:x}", Sha256::digest(&bytes));
        fs::write(layout.join("blobs/sha256").join(&digest), &bytes)?;
        descriptor["digest"] = json!(format!("sha256:{digest}"));
        descriptor["size"] = json!(bytes.len());
        Ok(())
    };
    let index_file = layout.join("index.json");
    let mut index = read(&index_file)?;
    let mut manifest = read(&blob(&index["manifests"][0]["digest"]))?;
    let mut config = read(&blob(&manifest["config"]["digest"]))?;
    change(&mut config["config"]);
    write(&mut manifest["config"], &config)?;
    write(&mut index["manifests"][0], &manifest)?;
    index["manifests"][0]["annotations"]["io.containerd.image.name"] = json!(image);
    fs::write(index_file, index.to_string())?;
    Ok(())
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command
        .output()
        .with_context(|| format!("Failed to run {command:?}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed: {}", text.trim());
    }
    Ok(())
}

//! Images: from a name to the configuration and the layers' chain id.

use containerd_client::services::v1 as services;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::types::Descriptor as WireDescriptor;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{ContainerdError, Namespaced, Result, refused};

/// The largest manifest or configuration that is read.
const MAX_DOCUMENT: usize = 4 << 20;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(
        "There is no image {name} in the containerd namespace {namespace}; import it with `ctr -n {namespace} images import FILE` or pull it with `ctr -n {namespace} images pull {name}`"
    )]
    Unknown { name: String, namespace: String },
    #[error("The image {name} has no variant for linux/amd64; use an image built for this machine")]
    Platform { name: String },
    #[error(
        "The document {digest} of the image {name} is not valid: {reason}; import the image again"
    )]
    Document {
        name: String,
        digest: String,
        reason: String,
    },
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
}

/// What a function needs to know of its image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedImage {
    /// The full name in containerd.
    pub name: String,
    /// Digest of the manifest for this platform.
    pub digest: String,
    /// Digest of what the name points to: an index or the manifest.
    pub target: String,
    /// Name of the snapshot that holds all layers.
    pub chain_id: String,
    pub config: ImageConfig,
}

/// The process that an image asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    #[serde(default, rename = "Entrypoint", deserialize_with = "null_as_default")]
    pub entrypoint: Vec<String>,
    #[serde(default, rename = "Cmd", deserialize_with = "null_as_default")]
    pub cmd: Vec<String>,
    #[serde(default, rename = "Env", deserialize_with = "null_as_default")]
    pub env: Vec<String>,
    #[serde(default, rename = "User", deserialize_with = "null_as_default")]
    pub user: String,
    #[serde(default, rename = "WorkingDir", deserialize_with = "null_as_default")]
    pub working_dir: String,
}

fn null_as_default<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
pub(super) struct Manifest {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    pub(super) layers: Vec<Descriptor>,
}

#[derive(Deserialize, Clone)]
pub(super) struct Descriptor {
    #[serde(default, rename = "mediaType")]
    pub(super) media_type: String,
    pub(super) digest: String,
    #[serde(default)]
    pub(super) size: i64,
    platform: Option<Platform>,
}

#[derive(Deserialize, Clone)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct ConfigDocument {
    #[serde(default)]
    config: Option<ImageConfig>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// An image's documents, read.
pub(super) struct ReadImage {
    pub(super) resolved: ResolvedImage,
    pub(super) manifest: Manifest,
    pub(super) diff_ids: Vec<String>,
}

impl Namespaced {
    /// Finds the image `name`, also by the short forms that people write, and reads it.
    pub async fn resolve_image(
        &self,
        name: &str,
    ) -> std::result::Result<ResolvedImage, ImageError> {
        Ok(self.read_image(name).await?.resolved)
    }

    pub(super) async fn read_image(
        &self,
        name: &str,
    ) -> std::result::Result<ReadImage, ImageError> {
        let (full, target) = self.find_image(name).await?;
        let (digest, manifest) = self.platform_manifest(&full, &target).await?;
        let config_digest = match &manifest.config {
            Some(config) => config.digest.clone(),
            None => {
                return Err(ImageError::Document {
                    name: full,
                    digest,
                    reason: "it names no configuration".to_owned(),
                });
            }
        };
        let config: ConfigDocument = self.read_document(&full, &config_digest).await?;
        if config.rootfs.diff_ids.is_empty() {
            return Err(ImageError::Document {
                name: full,
                digest: config_digest,
                reason: "it has no layers".to_owned(),
            });
        }
        Ok(ReadImage {
            resolved: ResolvedImage {
                name: full,
                digest,
                target: target.digest,
                chain_id: chain_id(&config.rootfs.diff_ids),
                config: config.config.unwrap_or_default(),
            },
            manifest,
            diff_ids: config.rootfs.diff_ids,
        })
    }

    async fn find_image(
        &self,
        name: &str,
    ) -> std::result::Result<(String, WireDescriptor), ImageError> {
        let mut client = ImagesClient::new(self.channel.clone());
        for candidate in full_names(name) {
            let request = self.request(services::GetImageRequest {
                name: candidate.clone(),
            });
            let found = client
                .get(request)
                .await
                .map_err(refused(format!("find the image {candidate}")));
            match found {
                Ok(answer) => {
                    if let Some(target) = answer.into_inner().image.and_then(|i| i.target) {
                        return Ok((candidate, target));
                    }
                }
                Err(err) if err.is_not_found() => {}
                Err(err) => return Err(err.into()),
            }
        }
        Err(ImageError::Unknown {
            name: name.to_owned(),
            namespace: self.name().to_owned(),
        })
    }

    /// Follows an index to the manifest for this platform.
    async fn platform_manifest(
        &self,
        name: &str,
        target: &WireDescriptor,
    ) -> std::result::Result<(String, Manifest), ImageError> {
        let mut digest = target.digest.clone();
        // An index may point to an index; more than a few levels is no image.
        for _ in 0..4 {
            let manifest: Manifest = self.read_document(name, &digest).await?;
            if manifest.config.is_some() {
                return Ok((digest, manifest));
            }
            let ours = |d: &&Descriptor| match &d.platform {
                Some(p) => p.os == "linux" && p.architecture == "amd64",
                None => true,
            };
            match manifest.manifests.iter().find(ours) {
                Some(next) => digest.clone_from(&next.digest),
                None => break,
            }
        }
        Err(ImageError::Platform {
            name: name.to_owned(),
        })
    }

    async fn read_document<T: for<'de> Deserialize<'de>>(
        &self,
        name: &str,
        digest: &str,
    ) -> std::result::Result<T, ImageError> {
        let bytes = self.read_content(digest).await?;
        serde_json::from_slice(&bytes).map_err(|err| ImageError::Document {
            name: name.to_owned(),
            digest: digest.to_owned(),
            reason: err.to_string(),
        })
    }

    async fn read_content(&self, digest: &str) -> Result<Vec<u8>> {
        let action = || format!("read the content {digest}");
        let request = self.request(services::ReadContentRequest {
            digest: digest.to_owned(),
            offset: 0,
            size: 0,
        });
        let mut stream = ContentClient::new(self.channel.clone())
            .read(request)
            .await
            .map_err(refused(action()))?
            .into_inner();
        let mut bytes = Vec::new();
        while let Some(part) = stream.message().await.map_err(refused(action()))? {
            bytes.extend_from_slice(&part.data);
            if bytes.len() > MAX_DOCUMENT {
                break;
            }
        }
        Ok(bytes)
    }
}

/// The names under which containerd may know what a user calls `name`.
fn full_names(name: &str) -> Vec<String> {
    let last = name.rsplit('/').next().unwrap_or(name);
    let tagged = if last.contains(':') || name.contains('@') {
        name.to_owned()
    } else {
        format!("{name}:latest")
    };
    let mut names = vec![name.to_owned(), tagged.clone()];
    let first = tagged.split('/').next().unwrap_or("");
    let has_host = tagged.contains('/')
        && (first.contains('.') || first.contains(':') || first == "localhost");
    if !has_host {
        if !tagged.contains('/') {
            names.push(format!("docker.io/library/{tagged}"));
        } else {
            names.push(format!("docker.io/{tagged}"));
        }
    }
    names.dedup();
    names
}

/// The name of the snapshot that holds the layers `diff_ids`, as containerd unpacks them.
pub(super) fn chain_id(diff_ids: &[String]) -> String {
    let mut ids = diff_ids.iter();
    let first = ids.next().cloned().unwrap_or_default();
    ids.fold(first, |parent, diff| {
        let sum = Sha256::digest(format!("{parent} {diff}").as_bytes());
        let mut hex = String::from("sha256:");
        for byte in sum {
            hex.push_str(&format!("{byte:02x}"));
        }
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_layer_is_its_own_chain() {
        assert_eq!(chain_id(&["sha256:aa".to_owned()]), "sha256:aa");
    }

    #[test]
    fn a_chain_hashes_parent_and_layer() {
        // printf 'sha256:aa sha256:bb' | sha256sum
        let expected = Sha256::digest(b"sha256:aa sha256:bb");
        let hex: String = expected.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            chain_id(&["sha256:aa".to_owned(), "sha256:bb".to_owned()]),
            format!("sha256:{hex}")
        );
    }

    #[test]
    fn short_names_are_completed() {
        assert_eq!(
            full_names("hello"),
            ["hello", "hello:latest", "docker.io/library/hello:latest"]
        );
        assert_eq!(
            full_names("trenv/hello:1"),
            ["trenv/hello:1", "docker.io/trenv/hello:1"]
        );
        assert_eq!(full_names("localhost/hello:1"), ["localhost/hello:1"]);
        assert_eq!(
            full_names("reg.local:5000/a"),
            ["reg.local:5000/a", "reg.local:5000/a:latest"]
        );
    }

    #[test]
    fn a_configuration_with_nulls_is_read() {
        let doc: ConfigDocument = serde_json::from_str(
            r#"{"config":{"Entrypoint":null,"Cmd":["a"],"Env":null},"rootfs":{"diff_ids":["x"]}}"#,
        )
        .unwrap();
        assert_eq!(doc.config.unwrap().cmd, ["a"]);
    }
}

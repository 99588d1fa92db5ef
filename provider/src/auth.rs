//! Basic authentication from two secret files, as OpenFaaS lays them out.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};

const USER_FILE: &str = "basic-auth-user";
const PASSWORD_FILE: &str = "basic-auth-password";

/// Why the credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("Failed to read {path}; put the {what} there, or remove provider.secrets_dir")]
    Read {
        path: String,
        what: &'static str,
        source: std::io::Error,
    },
    #[error("The file {path} is empty; put the {what} there")]
    Empty { path: String, what: &'static str },
}

/// The one user and password that may change functions.
#[derive(Clone)]
pub struct BasicAuth {
    expected: [u8; 32],
}

impl std::fmt::Debug for BasicAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BasicAuth").finish_non_exhaustive()
    }
}

impl BasicAuth {
    /// Reads the files in `directory`.
    ///
    /// # Errors
    /// When one is missing or empty.
    pub fn read(directory: &Path) -> Result<Self, AuthError> {
        let read = |file: &str, what: &'static str| {
            let path = directory.join(file);
            let shown = path.display().to_string();
            let text = std::fs::read_to_string(&path).map_err(|source| AuthError::Read {
                path: shown.clone(),
                what,
                source,
            })?;
            match text.trim() {
                "" => Err(AuthError::Empty { path: shown, what }),
                value => Ok(value.to_owned()),
            }
        };
        let user = read(USER_FILE, "user's name")?;
        let password = read(PASSWORD_FILE, "password")?;
        Ok(Self::new(&user, &password))
    }

    fn new(user: &str, password: &str) -> Self {
        Self {
            expected: Sha256::digest(format!("{user}:{password}")).into(),
        }
    }

    /// Whether the request carries the right credentials. Digests are compared, so that the time
    /// taken tells nothing of the password.
    pub fn allows(&self, headers: &HeaderMap) -> bool {
        let given = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"))
            .and_then(|(_, encoded)| STANDARD.decode(encoded.trim()).ok());
        let Some(given) = given else {
            return false;
        };
        let given: [u8; 32] = Sha256::digest(given).into();
        given == self.expected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, value.parse().unwrap());
        headers
    }

    #[test]
    fn only_the_right_credentials_pass() {
        let auth = BasicAuth::new("admin", "s:e:c");
        let basic = |text: &str| headers(&format!("Basic {}", STANDARD.encode(text)));
        assert!(auth.allows(&basic("admin:s:e:c")));
        assert!(!auth.allows(&basic("admin:other")));
        assert!(!auth.allows(&basic("admin")));
        assert!(!auth.allows(&HeaderMap::new()));
        assert!(!auth.allows(&headers("Basic ???")));
        assert!(!auth.allows(&headers("Bearer abc")));
    }

    #[test]
    fn missing_and_empty_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            BasicAuth::read(dir.path()),
            Err(AuthError::Read { .. })
        ));
        std::fs::write(dir.path().join(USER_FILE), "admin\n").unwrap();
        std::fs::write(dir.path().join(PASSWORD_FILE), "\n").unwrap();
        assert!(matches!(
            BasicAuth::read(dir.path()),
            Err(AuthError::Empty { .. })
        ));
        std::fs::write(dir.path().join(PASSWORD_FILE), "pw\n").unwrap();
        let auth = BasicAuth::read(dir.path()).unwrap();
        let basic = headers(&format!("Basic {}", STANDARD.encode("admin:pw")));
        assert!(auth.allows(&basic));
    }
}

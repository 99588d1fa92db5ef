//! What the environment asks for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::duration;

/// How calls reach the function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// To the function's own HTTP server, which is started once.
    Http(Upstream),
    /// A process for each call; output is passed on as it comes.
    Streaming,
    /// A process for each call; input and output are held in memory.
    Serializing,
    /// As `Serializing`, with the classic watchdog's manners: content type of the call, standard
    /// error in the answer.
    Classic,
    /// Files of a directory.
    Static(PathBuf),
}

/// The function's own HTTP server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    pub address: SocketAddr,
    /// Put before the path of each call; empty or without a slash at its end.
    pub base: String,
}

/// Everything the environment says.
#[derive(Debug, Clone)]
pub struct Settings {
    pub mode: Mode,
    /// The function's command and its arguments; empty in mode `static`.
    pub process: Vec<String>,
    pub port: u16,
    pub metrics_port: u16,
    /// For one call; no limit when absent.
    pub exec_timeout: Option<Duration>,
    pub read_timeout: Duration,
    pub write_timeout: Duration,
    /// How long calls are still taken after SIGTERM, while health already says no.
    pub healthcheck_interval: Duration,
    /// Calls at a time; no limit when 0.
    pub max_inflight: usize,
    pub prefix_logs: bool,
    pub log_buffer_size: usize,
    pub suppress_lock: bool,
    /// Asked of the function by `/_/ready`.
    pub ready_path: Option<String>,
    pub content_type: Option<String>,
    pub cgi_headers: bool,
    pub combine_output: bool,
    pub write_debug: bool,
    pub buffer_body: bool,
}

/// An environment that cannot be obeyed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    #[error("`{name}` is {value:?}; give {expected}")]
    Invalid {
        name: &'static str,
        value: String,
        expected: &'static str,
    },
    #[error("`{name}` is not set, and mode `{mode}` needs it")]
    Missing {
        name: &'static str,
        mode: &'static str,
    },
    #[error("`{name}` is set, but this watchdog cannot do that; unset it to serve without")]
    Unsupported { name: &'static str },
}

impl Settings {
    /// Reads the settings with `get`, which gives a variable's value.
    pub fn from_environment(get: impl Fn(&str) -> Option<String>) -> Result<Self, SettingsError> {
        let read = Reader { get: &get };
        for name in ["jwt_auth", "oauth_provider"] {
            // To serve without a check that somebody relies on would be worse than not to serve.
            if read.flag(name, false)? {
                return Err(SettingsError::Unsupported { name });
            }
        }
        let process: Vec<String> = read
            .text("fprocess")
            .or_else(|| read.text("function_process"))
            .unwrap_or_default()
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        let mode = read.mode()?;
        if process.is_empty() && !matches!(mode, Mode::Static(_)) {
            return Err(SettingsError::Missing {
                name: "fprocess",
                mode: mode.name(),
            });
        }
        let ten_seconds = Duration::from_secs(10);
        let exec_timeout = match read.text("exec_timeout") {
            Some(_) => read.duration("exec_timeout", ten_seconds)?,
            None => read.duration("hard_timeout", ten_seconds)?,
        };
        let buffer_body =
            read.flag("http_buffer_req_body", false)? || read.flag("buffer_http", false)?;
        Ok(Self {
            mode,
            process,
            port: read.number("port", 8080)?,
            metrics_port: read.number("metrics_port", 8081)?,
            exec_timeout: Some(exec_timeout).filter(|limit| !limit.is_zero()),
            read_timeout: read.duration("read_timeout", ten_seconds)?,
            write_timeout: read.duration("write_timeout", ten_seconds)?,
            healthcheck_interval: read.duration("healthcheck_interval", Duration::ZERO)?,
            max_inflight: read.number("max_inflight", 0)?,
            prefix_logs: read.flag("prefix_logs", true)?,
            log_buffer_size: read.number("log_buffer_size", 65_536)?,
            suppress_lock: read.flag("suppress_lock", false)?,
            ready_path: read.text("ready_path"),
            content_type: read.text("content_type"),
            cgi_headers: read.flag("cgi_headers", true)?,
            combine_output: read.flag("combine_output", true)?,
            write_debug: read.flag("write_debug", false)?,
            buffer_body,
        })
    }
}

impl Mode {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Http(_) => "http",
            Self::Streaming => "streaming",
            Self::Serializing => "serializing",
            Self::Classic => "fork",
            Self::Static(_) => "static",
        }
    }
}

struct Reader<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
}

impl Reader<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.get)(name).filter(|value| !value.is_empty())
    }

    fn parsed<T>(
        &self,
        name: &'static str,
        default: T,
        expected: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, SettingsError> {
        let Some(value) = self.text(name) else {
            return Ok(default);
        };
        parse(value.trim()).ok_or(SettingsError::Invalid {
            name,
            value,
            expected,
        })
    }

    fn duration(&self, name: &'static str, default: Duration) -> Result<Duration, SettingsError> {
        let expected = "a duration such as 10s or 1m30s";
        self.parsed(name, default, expected, duration::parse)
    }

    fn number<T: std::str::FromStr>(
        &self,
        name: &'static str,
        default: T,
    ) -> Result<T, SettingsError> {
        self.parsed(name, default, "a number", |value| value.parse().ok())
    }

    fn flag(&self, name: &'static str, default: bool) -> Result<bool, SettingsError> {
        self.parsed(name, default, "true or false", |value| match value {
            "1" | "t" | "T" | "true" | "True" | "TRUE" => Some(true),
            "0" | "f" | "F" | "false" | "False" | "FALSE" => Some(false),
            _ => None,
        })
    }

    fn mode(&self) -> Result<Mode, SettingsError> {
        let names = ["upstream_url", "http_upstream_url"];
        let url = names
            .into_iter()
            .find_map(|name| Some((name, self.text(name)?)));
        let name = self.text("mode").unwrap_or_else(|| {
            let default = if url.is_some() { "http" } else { "streaming" };
            default.to_owned()
        });
        match name.as_str() {
            "http" => {
                let (name, value) = url.ok_or(SettingsError::Missing {
                    name: "upstream_url",
                    mode: "http",
                })?;
                let upstream = Upstream::parse(&value).ok_or(SettingsError::Invalid {
                    name,
                    value,
                    expected: "a URL such as http://127.0.0.1:5000, with an address and no name",
                })?;
                Ok(Mode::Http(upstream))
            }
            "streaming" => Ok(Mode::Streaming),
            "serializing" => Ok(Mode::Serializing),
            "fork" | "classic" => Ok(Mode::Classic),
            "static" => {
                let path = self.text("static_path").ok_or(SettingsError::Missing {
                    name: "static_path",
                    mode: "static",
                })?;
                Ok(Mode::Static(path.into()))
            }
            _ => Err(SettingsError::Invalid {
                name: "mode",
                value: name,
                expected: "http, streaming, serializing, fork or static",
            }),
        }
    }
}

impl Upstream {
    fn parse(url: &str) -> Option<Self> {
        let rest = url.strip_prefix("http://").unwrap_or(url);
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let address = match authority.parse() {
            Ok(address) => address,
            Err(_) => {
                let (host, port) = match authority.rsplit_once(':') {
                    Some((host, port)) => (host, port.parse().ok()?),
                    None => (authority, 80),
                };
                let host = match host {
                    "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
                    host => host.parse().ok()?,
                };
                SocketAddr::new(host, port)
            }
        };
        let path = path.trim_end_matches('/');
        let base = if path.is_empty() {
            String::new()
        } else {
            format!("/{path}")
        };
        Some(Self { address, base })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        Settings::from_environment(|name| {
            let found = variables.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn an_upstream_url_means_mode_http() {
        let found = settings(&[
            ("fprocess", "python3  index.py"),
            ("upstream_url", "http://localhost:5000/api/"),
        ]);
        let found = found.unwrap();
        assert_eq!(found.process, ["python3", "index.py"]);
        let upstream = Upstream {
            address: ([127, 0, 0, 1], 5000).into(),
            base: "/api".to_owned(),
        };
        assert_eq!(found.mode, Mode::Http(upstream));
        assert_eq!(found.exec_timeout, Some(Duration::from_secs(10)));
    }

    #[test]
    fn without_one_a_process_runs_for_each_call() {
        assert_eq!(
            settings(&[("fprocess", "cat")]).unwrap().mode,
            Mode::Streaming
        );
        let found = settings(&[
            ("fprocess", "cat"),
            ("mode", "serializing"),
            ("exec_timeout", "0"),
            ("combine_output", "false"),
        ]);
        let found = found.unwrap();
        assert_eq!(found.mode, Mode::Serializing);
        assert_eq!(found.exec_timeout, None);
        assert!(!found.combine_output);
    }

    #[test]
    fn what_cannot_be_obeyed_is_refused_by_name() {
        let cases: [(&[(&str, &str)], &str); 7] = [
            (&[], "`fprocess` is not set"),
            (
                &[("fprocess", "x"), ("mode", "http")],
                "`upstream_url` is not set",
            ),
            (
                &[("fprocess", "x"), ("mode", "inproc")],
                "`mode` is \"inproc\"",
            ),
            (
                &[("fprocess", "x"), ("upstream_url", "http://db:80")],
                "no name",
            ),
            (
                &[("fprocess", "x"), ("read_timeout", "soon")],
                "`read_timeout` is \"soon\"",
            ),
            (
                &[("fprocess", "x"), ("jwt_auth", "true")],
                "`jwt_auth` is set",
            ),
            (&[("mode", "static")], "`static_path` is not set"),
        ];
        for (variables, expected) in cases {
            let text = settings(variables).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
    }
}

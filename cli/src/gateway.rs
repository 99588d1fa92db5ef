//! The client of the provider's REST interface.
//!
//! Every request opens a connection of its own: a command makes few of them, and `bench` measures
//! each call from the connection on, so that every kind of start is measured alike.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use base64::Engine;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use trenv_config::Config;

/// How to reach the gateway, as given on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct GatewayOptions {
    /// URL of the gateway; the configuration's listening address when absent
    #[arg(long, short = 'g', env = "OPENFAAS_URL", global = true)]
    pub gateway: Option<String>,
    /// User for basic authentication; from the configuration's secrets when absent
    #[arg(long, global = true)]
    pub user: Option<String>,
    /// Password for basic authentication; from the configuration's secrets when absent
    #[arg(long, env = "OPENFAAS_PASSWORD", hide_env_values = true, global = true)]
    pub password: Option<String>,
}

/// A gateway: where it is and how to log in.
#[derive(Debug, Clone)]
pub struct Gateway {
    endpoint: Endpoint,
    prefix: String,
    authorization: Option<String>,
}

/// An HTTP server at an address; what a call is sent to.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
}

/// A complete reply and when it came.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// From the start of the request to the first byte of the body.
    pub first_byte: Duration,
}

impl Reply {
    /// A header as text, empty when absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }
}

impl Endpoint {
    /// Opens a connection and sends a request; the reply's body is still to be read.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> anyhow::Result<Response<Incoming>> {
        let address = (self.host.as_str(), self.port);
        let stream = TcpStream::connect(address)
            .await
            .with_context(|| format!("Failed to connect to {}:{}", self.host, self.port))?;
        stream
            .set_nodelay(true)
            .context("Failed to set TCP_NODELAY")?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .context("Failed to start HTTP")?;
        // Ends when the reply is read or dropped.
        tokio::spawn(connection);
        sender
            .send_request(request)
            .await
            .with_context(|| format!("No reply from {}:{}", self.host, self.port))
    }

    /// Sends a request and reads the whole reply, with the time to its first and last byte.
    pub async fn measure(&self, request: Request<Full<Bytes>>) -> anyhow::Result<Reply> {
        let start = Instant::now();
        let response = self.send(request).await?;
        let (parts, mut body) = response.into_parts();
        let mut first_byte = None;
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.context("The reply was cut off")?;
            if let Some(data) = frame.data_ref() {
                first_byte.get_or_insert_with(|| start.elapsed());
                bytes.extend_from_slice(data);
            }
        }
        Ok(Reply {
            status: parts.status,
            headers: parts.headers,
            body: bytes.into(),
            first_byte: first_byte.unwrap_or_else(|| start.elapsed()),
        })
    }

    /// A request for this server.
    pub fn request(
        &self,
        method: Method,
        path: &str,
        body: impl Into<Bytes>,
    ) -> anyhow::Result<Request<Full<Bytes>>> {
        Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, format!("{}:{}", self.host, self.port))
            .body(Full::new(body.into()))
            .with_context(|| format!("{path} is not a valid request path"))
    }
}

impl Gateway {
    /// The gateway that the options name, else the one of this machine's configuration.
    pub fn new(options: &GatewayOptions, config: &Config) -> anyhow::Result<Self> {
        let url = match &options.gateway {
            Some(url) => url.clone(),
            None => format!("http://{}", reachable(&config.provider.listen)),
        };
        let uri: Uri = url
            .parse()
            .with_context(|| format!("The gateway {url:?} is not a URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some(other) => bail!("The gateway {url:?} uses {other}, but only http is supported"),
            None => bail!("The gateway {url:?} has no scheme; write http://{url}"),
        }
        let host = uri
            .host()
            .with_context(|| format!("The gateway {url:?} names no host"))?;
        let authorization = credentials(options, config)?.map(|(user, password)| {
            let login = format!("{user}:{password}");
            format!(
                "Basic {}",
                base64::engine::general_purpose::STANDARD.encode(login)
            )
        });
        Ok(Self {
            endpoint: Endpoint {
                host: host.trim_matches(['[', ']']).to_owned(),
                port: uri.port_u16().unwrap_or(80),
            },
            prefix: uri.path().trim_end_matches('/').to_owned(),
            authorization,
        })
    }

    /// A request with the credentials, for [`Gateway::measure`] or [`Gateway::send`].
    pub fn request(
        &self,
        method: Method,
        path: &str,
        body: impl Into<Bytes>,
    ) -> anyhow::Result<Request<Full<Bytes>>> {
        let path = format!("{}{path}", self.prefix);
        let mut request = self.endpoint.request(method, &path, body)?;
        if let Some(value) = &self.authorization {
            let value = value.parse().context("The credentials are not text")?;
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        Ok(request)
    }

    pub async fn send(&self, request: Request<Full<Bytes>>) -> anyhow::Result<Response<Incoming>> {
        self.endpoint.send(request).await.context(
            "The gateway cannot be reached; see that trenv-provider runs, or name it with --gateway",
        )
    }

    pub async fn measure(&self, request: Request<Full<Bytes>>) -> anyhow::Result<Reply> {
        self.endpoint.measure(request).await
    }

    /// Sends a request to a `/system` route and returns the reply, whatever its status is.
    pub async fn system(
        &self,
        method: Method,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let bytes = match body {
            Some(value) => serde_json::to_vec(value)?,
            None => Vec::new(),
        };
        let mut request = self.request(method, path, bytes)?;
        if body.is_some() {
            let json = http::HeaderValue::from_static("application/json");
            request.headers_mut().insert(CONTENT_TYPE, json);
        }
        let response = self.send(request).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        if status == StatusCode::UNAUTHORIZED {
            bail!("The gateway refused the credentials; give --user and --password");
        }
        Ok((status, bytes))
    }

    /// Reads a `/system` route that answers with JSON.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let (status, body) = self.system(Method::GET, path, None).await?;
        accept(status, &body)?;
        serde_json::from_slice(&body)
            .with_context(|| format!("The answer to {path} is not as documented"))
    }
}

/// An error with the gateway's own words when the status is not a success.
pub fn accept(status: StatusCode, body: &[u8]) -> anyhow::Result<()> {
    if status.is_success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    if text.is_empty() {
        bail!("The gateway answered {status}");
    }
    bail!("The gateway answered {status}: {text}")
}

/// An address to connect to, from one to listen on.
fn reachable(listen: &str) -> String {
    match listen.rsplit_once(':') {
        Some(("0.0.0.0" | "[::]" | "", port)) => format!("127.0.0.1:{port}"),
        _ => listen.to_owned(),
    }
}

fn credentials(
    options: &GatewayOptions,
    config: &Config,
) -> anyhow::Result<Option<(String, String)>> {
    let stored = |name: &str| -> anyhow::Result<Option<String>> {
        let Some(directory) = &config.provider.secrets_dir else {
            return Ok(None);
        };
        read_secret(&directory.join(name))
    };
    let user = match &options.user {
        Some(user) => Some(user.clone()),
        None => stored("basic-auth-user")?,
    };
    let password = match &options.password {
        Some(password) => Some(password.clone()),
        None => stored("basic-auth-password")?,
    };
    Ok(match (user, password) {
        (Some(user), Some(password)) => Some((user, password)),
        (None, Some(password)) => Some(("admin".to_owned(), password)),
        (Some(_), None) => bail!("A user without a password is no login; give --password too"),
        (None, None) => None,
    })
}

fn read_secret(path: &Path) -> anyhow::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err).with_context(|| format!("Failed to read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(gateway: Option<&str>) -> GatewayOptions {
        GatewayOptions {
            gateway: gateway.map(Into::into),
            user: None,
            password: None,
        }
    }

    #[test]
    fn the_configuration_names_the_gateway_when_nothing_else_does() {
        let gateway = Gateway::new(&options(None), &Config::default()).unwrap();
        assert_eq!(gateway.endpoint.host, "127.0.0.1");
        assert_eq!(gateway.endpoint.port, 8080);
        assert_eq!(reachable("0.0.0.0:31112"), "127.0.0.1:31112");
    }

    #[test]
    fn a_url_may_have_a_path_and_no_port() {
        let gateway =
            Gateway::new(&options(Some("http://host/faas/")), &Config::default()).unwrap();
        assert_eq!(gateway.endpoint.port, 80);
        assert_eq!(gateway.prefix, "/faas");
    }

    #[test]
    fn what_cannot_be_reached_is_refused_by_name() {
        for url in ["https://host", "host:8080", "localhost", ""] {
            assert!(
                Gateway::new(&options(Some(url)), &Config::default()).is_err(),
                "{url}"
            );
        }
    }

    #[test]
    fn credentials_come_from_the_secrets_and_options_go_first() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("basic-auth-user"), "u\n").unwrap();
        std::fs::write(directory.path().join("basic-auth-password"), "p\n").unwrap();
        let mut config = Config::default();
        config.provider.secrets_dir = Some(directory.path().into());
        let stored = credentials(&options(None), &config).unwrap();
        assert_eq!(stored, Some(("u".into(), "p".into())));
        let mut given = options(None);
        given.password = Some("q".into());
        assert_eq!(
            credentials(&given, &config).unwrap(),
            Some(("u".into(), "q".into()))
        );
    }
}

//! Connections to functions.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::body::Body;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// How long a new instance may refuse connections.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
const CONNECT_PAUSE: Duration = Duration::from_millis(2);

/// Connects; a function that is about to listen gets a moment.
pub async fn connect(
    address: SocketAddr,
    gone: &CancellationToken,
) -> Result<SendRequest<Body>, String> {
    let patience = Instant::now() + CONNECT_PATIENCE;
    let stream = loop {
        let left = patience.saturating_duration_since(Instant::now());
        let tried = tokio::select! {
            tried = tokio::time::timeout(left, TcpStream::connect(address)) => tried,
            () = gone.cancelled() => return Err("its sandbox has ended".to_owned()),
        };
        match tried {
            Ok(Ok(stream)) => break stream,
            Ok(Err(err)) if left.is_zero() => return Err(err.to_string()),
            Ok(Err(_)) => tokio::time::sleep(CONNECT_PAUSE).await,
            Err(_) => {
                return Err(format!(
                    "no connection to {} within {} s",
                    address,
                    CONNECT_PATIENCE.as_secs()
                ));
            }
        }
    };
    stream.set_nodelay(true).map_err(|err| err.to_string())?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|err| describe(&err))?;
    let gone = gone.clone();
    tokio::spawn(async move {
        // The connection ends when nobody holds its sender, or with its sandbox.
        tokio::select! {
            _ = connection => {}
            () = gone.cancelled() => {}
        }
    });
    Ok(sender)
}

/// An error with its causes, since hyper tells the cause in the source only.
pub fn describe(err: &hyper::Error) -> String {
    let mut text = err.to_string();
    let mut source = std::error::Error::source(err);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

//! Mode `static`: files of a directory.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, LOCATION};
use http::{Method, Response, StatusCode, Uri};
use http_body::{Body, Frame, SizeHint};

use crate::body::{BodyError, Reply, full};

const TYPES: [(&str, &str); 14] = [
    ("css", "text/css; charset=utf-8"),
    ("gif", "image/gif"),
    ("htm", "text/html; charset=utf-8"),
    ("html", "text/html; charset=utf-8"),
    ("jpeg", "image/jpeg"),
    ("jpg", "image/jpeg"),
    ("js", "text/javascript; charset=utf-8"),
    ("json", "application/json"),
    ("pdf", "application/pdf"),
    ("png", "image/png"),
    ("svg", "image/svg+xml"),
    ("txt", "text/plain; charset=utf-8"),
    ("wasm", "application/wasm"),
    ("webp", "image/webp"),
];

/// Answers with the file that the path names below `root`, or with `index.html` of a directory.
pub fn answer(root: &Path, method: &Method, uri: &Uri) -> Response<Reply> {
    if method != Method::GET && method != Method::HEAD {
        return status(StatusCode::METHOD_NOT_ALLOWED);
    }
    let Some(mut path) = below(root, uri.path()) else {
        return status(StatusCode::NOT_FOUND);
    };
    if path.is_dir() {
        if !uri.path().ends_with('/') {
            let mut response = status(StatusCode::MOVED_PERMANENTLY);
            if let Ok(place) = HeaderValue::from_str(&format!("{}/", uri.path())) {
                response.headers_mut().insert(LOCATION, place);
            }
            return response;
        }
        path.push("index.html");
    }
    let opened = File::open(&path).and_then(|file| {
        let length = file.metadata()?.len();
        Ok((file, length))
    });
    let (file, length) = match opened {
        Ok(opened) => opened,
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            return status(StatusCode::FORBIDDEN);
        }
        Err(_) => return status(StatusCode::NOT_FOUND),
    };
    let body: Reply = if method == Method::HEAD {
        full(Bytes::new())
    } else {
        Box::pin(FileBody { file, left: length })
    };
    let mut response = Response::new(body);
    let content_type = HeaderValue::from_static(content_type(&path));
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    response
}

fn status(status: StatusCode) -> Response<Reply> {
    let mut response = Response::new(full(format!("{status}\n")));
    *response.status_mut() = status;
    response
}

/// The file below `root` that a request's path names; none for a path that could lead out of it.
fn below(root: &Path, path: &str) -> Option<PathBuf> {
    let mut file = root.to_path_buf();
    for part in path.split('/').filter(|part| !part.is_empty()) {
        let part = decode(part)?;
        if part == "." || part == ".." || part.contains(['/', '\0']) {
            return None;
        }
        file.push(part);
    }
    Some(file)
}

/// Resolves `%20` and the like.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = after;
    }
    String::from_utf8(bytes).ok()
}

fn content_type(path: &Path) -> &'static str {
    let extension = path.extension().and_then(|extension| extension.to_str());
    TYPES
        .into_iter()
        .find(|(name, _)| extension.is_some_and(|e| e.eq_ignore_ascii_case(name)))
        .map_or("application/octet-stream", |(_, content_type)| content_type)
}

/// A file's bytes, read as they are sent. Reading blocks, which a local file does not for long, and
/// which spares a pool of threads.
struct FileBody {
    file: File,
    left: u64,
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let mut buffer = vec![0; self.left.min(65_536) as usize];
        match self.file.read(&mut buffer) {
            Ok(0) => Poll::Ready(Some(Err("the file became shorter".into()))),
            Err(e) => Poll::Ready(Some(Err(e.into()))),
            Ok(count) => {
                self.left -= count as u64;
                buffer.truncate(count);
                Poll::Ready(Some(Ok(Frame::data(buffer.into()))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_root() {
        let root = Path::new("/srv");
        assert_eq!(below(root, "/a%20b//c.txt"), Some("/srv/a b/c.txt".into()));
        for path in [
            "/../etc/passwd",
            "/a/%2e%2e/b",
            "/a%2fb",
            "/%00",
            "/%zz",
            "/%f",
        ] {
            assert_eq!(below(root, path), None, "{path}");
        }
    }
}

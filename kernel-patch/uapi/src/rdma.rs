//! `/dev/pseudo_mm_rdma`: connections to pools on other machines.
//!
//! The structures are those of `driver/include/uapi/linux/pseudo_mm_rdma.h`, which also says what a
//! server has to do. A [`Connection`] is registered as a remote pool:
//!
//! ```no_run
//! # fn main() -> std::io::Result<()> {
//! use std::time::Duration;
//! let server = "10.0.0.7:7471".parse().unwrap();
//! let pool = pseudo_mm_uapi::rdma::connect(server, b"who we are", Duration::from_secs(2))?;
//! pseudo_mm_uapi::Device::open()?.register_remote(&pool)?;
//! # Ok(())
//! # }
//! ```

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::abi::{self, RdmaConnect};

/// Where the client's device is.
pub const PATH: &str = "/dev/pseudo_mm_rdma";

/// A connection to a server, which lasts as long as the descriptor and what is registered of it.
#[derive(Debug)]
pub struct Connection {
    device: File,
    /// Pages of the pool.
    pub pages: u64,
    /// Which of the server's pools it is.
    pub generation: u64,
    pub uuid: [u8; 16],
}

/// Connects to a server that knows the caller by `hello`. Needs `CAP_SYS_ADMIN`.
///
/// `NotFound` says that the kernel has no such client, `ConnectionRefused` that the server does not
/// want this one. A step of connecting, and later a read, takes at most `timeout`, which is a minute
/// at most.
pub fn connect(server: SocketAddr, hello: &[u8], timeout: Duration) -> io::Result<Connection> {
    let device = File::options().read(true).write(true).open(PATH)?;
    let address = SockAddr::from(server);
    let mut connect = RdmaConnect::new();
    connect.timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    (connect.server, connect.server_size) = address.parts();
    connect.hello = hello.as_ptr() as u64;
    connect.hello_size = super::length(hello)?;
    super::command(device.as_fd(), abi::RDMA_CONNECT, &mut connect)?;
    Ok(Connection {
        device,
        pages: connect.pages,
        generation: connect.generation,
        uuid: connect.uuid,
    })
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// An address as the kernel has it.
enum SockAddr {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
}

impl From<SocketAddr> for SockAddr {
    fn from(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(v4) => Self::V4(libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(v6) => Self::V6(libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            }),
        }
    }
}

impl SockAddr {
    /// Where it is, and its size.
    fn parts(&self) -> (u64, u32) {
        match self {
            Self::V4(v4) => (
                std::ptr::from_ref(v4) as u64,
                abi::size_of::<libc::sockaddr_in>(),
            ),
            Self::V6(v6) => (
                std::ptr::from_ref(v6) as u64,
                abi::size_of::<libc::sockaddr_in6>(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_in_network_order() {
        let SockAddr::V4(v4) = SockAddr::from("10.99.0.1:17501".parse::<SocketAddr>().unwrap())
        else {
            panic!("an address of another family");
        };
        assert_eq!(v4.sin_port.to_ne_bytes(), [0x44, 0x5d]);
        assert_eq!(v4.sin_addr.s_addr.to_ne_bytes(), [10, 99, 0, 1]);
        let SockAddr::V6(v6) = SockAddr::from("[fe80::1%3]:2".parse::<SocketAddr>().unwrap())
        else {
            panic!("an address of another family");
        };
        assert_eq!(v6.sin6_scope_id, 3);
        assert_eq!(v6.sin6_addr.s6_addr[15], 1);
    }
}

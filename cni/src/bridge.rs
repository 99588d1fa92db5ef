//! What all sandboxes share: bridge, forwarding, masquerade; and the sweep after a crash.

use std::{
    fs, io,
    net::Ipv4Addr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use ipnetwork::Ipv4Network;

use crate::{
    Netns, NetworkError, Step, masquerade,
    namespace::{at_namespace, make_namespace, remove_namespace},
    neighbour,
    plugin::{self, Attachment, Plugins},
    record::{Record, Records},
};

/// Where and how sandboxes get their network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Name of the bridge, at most 15 bytes.
    pub bridge: String,
    /// IPv4 network, e.g. `10.62.0.0/16`; its first address is the bridge's.
    pub subnet: String,
    /// Directory of the CNI plugins.
    pub plugin_dir: PathBuf,
    /// Durable records go to `state_dir/network`.
    pub state_dir: PathBuf,
    /// Namespaces are bind mounts in `run_dir/netns`.
    pub run_dir: PathBuf,
    /// Name of the one nft table that is ours.
    pub nft_table: String,
}

/// The network of this machine's sandboxes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: NetworkConfig,
    gateway: Ipv4Addr,
    plugins: Plugins,
    records: Records,
    netns_dir: PathBuf,
}

impl Network {
    /// Checks the configuration and makes sure of the directories and the nft table. The bridge
    /// comes with the first namespace; the plugin then also turns on `net.ipv4.ip_forward`.
    ///
    /// # Errors
    /// When the subnet is not valid, a plugin is missing, or nft refuses.
    pub fn open(config: &NetworkConfig) -> Result<Self, NetworkError> {
        let wrong = || NetworkError::Subnet {
            subnet: config.subnet.clone(),
        };
        let subnet: Ipv4Network = config.subnet.parse().map_err(|_| wrong())?;
        if subnet.prefix() > 30 || subnet.ip() != subnet.network() {
            return Err(wrong());
        }
        let gateway = subnet.nth(1).ok_or_else(wrong)?;
        let records = Records::open(&config.state_dir.join("network"))?;
        let plugins = Plugins::new(config, subnet, gateway)?;
        let netns_dir = config.run_dir.join("netns");
        fs::create_dir_all(&netns_dir)
            .map_err(NetworkError::file("make the directory", &netns_dir))?;
        masquerade::load(&config.nft_table, subnet)?;
        Ok(Self {
            inner: Arc::new(Inner {
                config: config.clone(),
                gateway,
                plugins,
                records,
                netns_dir,
            }),
        })
    }

    /// The bridge's own address, every sandbox's gateway.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.inner.gateway
    }

    /// Makes one namespace with an address. Takes tens of milliseconds: make it ahead.
    ///
    /// # Errors
    /// When a plugin refuses, or the id is taken; nothing is left then.
    pub fn create(&self, id: &str) -> Result<Netns, NetworkError> {
        let inner = &self.inner;
        let mut steps = Vec::new();
        let mut step = |name, start: Instant| {
            steps.push(Step {
                name,
                took: start.elapsed(),
            });
        };
        let start = Instant::now();
        let record = inner.records.add(id)?;
        step("record", start);
        let path = inner.netns_dir.join(id);
        let start = Instant::now();
        let made = make_namespace(id, &path).and_then(|()| {
            step("namespace", start);
            let start = Instant::now();
            let attachment = inner.plugins.attach(id, &path);
            step("plugins", start);
            let attachment = attachment?;
            let start = Instant::now();
            inner.introduce(&path, &attachment)?;
            step("neighbours", start);
            Ok(attachment)
        });
        match made {
            Ok(Attachment {
                address, gateway, ..
            }) => Ok(Netns {
                id: id.to_owned(),
                path,
                address,
                gateway,
                steps,
                network: self.clone(),
                record: Some(record).into(),
            }),
            Err(error) => {
                // The first error is the one to report; what cannot be taken back now still has
                // its record for the next sweep.
                let _ = self.take_back(id, record);
                Err(error)
            }
        }
    }

    /// Makes one namespace under a new name.
    ///
    /// # Errors
    /// As [`Network::create`].
    pub fn create_unnamed(&self) -> Result<Netns, NetworkError> {
        let path = PathBuf::from("/proc/sys/kernel/random/uuid");
        let id = fs::read_to_string(&path).map_err(NetworkError::file("read", path))?;
        self.create(&format!("n-{}", id.trim()))
    }

    /// Takes the address, the namespace and the record back, in this order.
    pub(crate) fn take_back(&self, id: &str, record: Record) -> Result<(), NetworkError> {
        let path = self.inner.netns_dir.join(id);
        self.inner.plugins.detach(id, &path)?;
        remove_namespace(&path)?;
        self.inner.forget()?;
        record.remove()
    }

    /// Takes back every namespace whose owner is dead. Answers how many there were.
    ///
    /// # Errors
    /// When one cannot be taken back; the others are still tried.
    pub fn sweep(&self) -> Result<usize, NetworkError> {
        let mut swept = 0;
        let mut first_error = None;
        for (id, record) in self.inner.records.abandoned()? {
            match self.take_back(&id, record) {
                Ok(()) => swept += 1,
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        first_error.map_or(Ok(swept), Err)
    }

    /// Removes the bridge and the nft table, when no namespace is left. `net.ipv4.ip_forward`
    /// stays as it is: something else may rely on it by now.
    ///
    /// # Errors
    /// When namespaces are left, or the kernel refuses.
    pub fn remove(&self) -> Result<(), NetworkError> {
        let left = self.inner.records.count()?;
        if left != 0 {
            return Err(NetworkError::InUse { left });
        }
        masquerade::unload(&self.inner.config.nft_table)?;
        let bridge = &self.inner.config.bridge;
        remove_bridge(bridge).map_err(|source| NetworkError::Bridge {
            bridge: bridge.clone(),
            source,
        })
    }
}

impl Inner {
    /// Tells the bridge and the sandbox each other's link-layer address for good. No call waits
    /// for ARP then, and no sandbox can pose as another or as the gateway.
    fn introduce(&self, netns: &Path, attachment: &Attachment) -> Result<(), NetworkError> {
        let bridge = &self.config.bridge;
        let failed = |doing| {
            move |source| NetworkError::Neighbour {
                doing,
                bridge: bridge.clone(),
                source,
            }
        };
        let gateway_link = fix_link_address(bridge, attachment.gateway)
            .map_err(failed("set the link-layer address"))?;
        neighbour::add(bridge, attachment.address, attachment.link)
            .map_err(failed("add a neighbour"))?;
        let gateway = attachment.gateway;
        at_namespace(netns, move || {
            neighbour::add(plugin::INTERFACE, gateway, gateway_link)
        })
        .map_err(failed("add the gateway to a neighbour"))
    }

    /// Forgets the neighbours whose addresses are given out no more.
    fn forget(&self) -> Result<(), NetworkError> {
        let given_out = |address: Ipv4Addr| self.plugins.addresses.join(address.to_string());
        neighbour::forget_others(&self.config.bridge, |address| given_out(address).exists())
            .map_err(|source| NetworkError::Neighbour {
                doing: "forget a neighbour",
                bridge: self.config.bridge.clone(),
                source,
            })
    }
}

/// Gives the bridge a link-layer address that follows from its own IP address: one that is not set
/// changes as sandboxes come and go.
fn fix_link_address(bridge: &str, gateway: Ipv4Addr) -> io::Result<[u8; 6]> {
    let [a, b, c, d] = gateway.octets();
    // The first byte says: locally administered, a single host.
    let link = [0x02, 0x74, a, b, c, d];
    let shown = fs::read_to_string(format!("/sys/class/net/{bridge}/address"))?;
    let wanted: Vec<String> = link.iter().map(|byte| format!("{byte:02x}")).collect();
    if shown.trim() == wanted.join(":") {
        return Ok(link);
    }
    let mut request = interface_request(bridge)?;
    let mut address = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: [0; 14],
    };
    for (to, from) in address.sa_data.iter_mut().zip(link) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_hwaddr = address;
    let socket = control_socket()?;
    // SAFETY: the ioctl reads an ifreq that outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFHWADDR, &raw const request) })?;
    Ok(link)
}

/// An interface's name as ioctls take it.
pub(crate) fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: a zeroed ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

/// Any socket of the current network namespace, to do ioctls on.
pub(crate) fn control_socket() -> io::Result<std::net::UdpSocket> {
    std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
}

pub(crate) fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// From linux/sockios.h.
const SIOCBRDELBR: libc::Ioctl = 0x89a1;

fn remove_bridge(name: &str) -> io::Result<()> {
    let socket = control_socket()?;
    let mut down = interface_request(name)?;
    down.ifr_ifru.ifru_flags = 0;
    // SAFETY: the first ioctl reads an ifreq, the second an interface name; both outlive the call.
    let removed = unsafe {
        check(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS,
            &raw const down,
        ))
        .and_then(|()| {
            check(libc::ioctl(
                socket.as_raw_fd(),
                SIOCBRDELBR,
                down.ifr_name.as_ptr(),
            ))
        })
    };
    match removed {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        removed => removed,
    }
}

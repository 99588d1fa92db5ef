//! The structures and numbers of the C headers, named without their prefix.
//!
//! Sizes and command numbers are asserted below; `tests/header.rs` compares every field with the
//! header itself.

const MAGIC: u32 = 0x1c;

/// `_IO(MAGIC, number)`: the size is in the structure and not in the number.
const fn io(number: u32) -> u32 {
    MAGIC << 8 | number
}

pub const VERSION: u32 = 1;

pub const FEATURE_ATTACH: u64 = 1 << 0;
pub const FEATURE_PUBLISHED: u64 = 1 << 1;
pub const FEATURE_LAZY: u64 = 1 << 2;
pub const FEATURE_REMOTE: u64 = 1 << 3;
pub const FEATURE_PROCESS: u64 = 1 << 4;
pub const FEATURE_PROMOTE_MAPPED: u64 = 1 << 5;
pub const FEATURE_FIGURES: u64 = 1 << 6;

pub const REMOTE_PUBLISHED: u32 = 1 << 0;

pub const SOURCE_DEVICE: u32 = 0;
pub const SOURCE_REMOTE: u32 = 1;

pub const ATTACH_PIDFD: u32 = 1 << 0;

pub const PROMOTE_MAPPED: u32 = 1 << 0;

pub const STATE_SEALED: u32 = 1 << 0;
pub const STATE_DELETED: u32 = 1 << 1;
pub const STATE_GONE: u32 = 1 << 2;

pub const INFO: u32 = io(0x20);
pub const REGISTER: u32 = io(0x21);
pub const CREATE: u32 = io(0x22);
pub const LIST: u32 = io(0x23);
pub const REGISTER_REMOTE: u32 = io(0x24);
pub const ADD: u32 = io(0x30);
pub const SEAL: u32 = io(0x31);
pub const ATTACH: u32 = io(0x32);
pub const STAT: u32 = io(0x33);
pub const QUERY: u32 = io(0x34);
pub const DELETE: u32 = io(0x35);
pub const PROMOTE: u32 = io(0x36);

pub const RDMA_CONNECT: u32 = io(0x40);
pub const RDMA_MAGIC: u32 = 0x706d_6d72;
pub const RDMA_VERSION: u32 = 1;
pub const RDMA_MAX_HELLO: u32 = 56;

const _: () = assert!(INFO == 0x1c20 && REGISTER_REMOTE == 0x1c24);
const _: () = assert!(ADD == 0x1c30 && PROMOTE == 0x1c36);

/// The size of a structure of the interface; all are far below 4 GiB.
#[expect(clippy::cast_possible_truncation)]
pub(crate) const fn size_of<T>() -> u32 {
    std::mem::size_of::<T>() as u32
}

/// A structure that a command takes: `repr(C)`, without padding, its own size in its first field.
pub(crate) trait SizeFirst {}

macro_rules! structures {
    ($($(#[$attribute:meta])* $name:ident: $bytes:literal {
        $($(#[$field_attribute:meta])* $field:ident: $type:ty,)*
    })*) => {$(
        $(#[$attribute])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
        pub struct $name {
            $($(#[$field_attribute])* pub $field: $type,)*
        }

        const _: () = assert!(std::mem::size_of::<$name>() == $bytes);
        // No padding, whose bytes would be undefined.
        const _: () = assert!(0 $(+ std::mem::size_of::<$type>())* == $bytes);
    )*};
}

structures! {
    /// What the driver can do, and its limits.
    Info: 48 {
        size: u32,
        version: u32,
        features: u64,
        page_size: u32,
        max_templates: u32,
        max_maps: u32,
        max_extents: u32,
        templates: u64,
        device_pages: u64,
    }
    Register: 16 {
        size: u32,
        dax_fd: i32,
        device_pages: u64,
    }
    RegisterRemote: 24 {
        size: u32,
        fd: i32,
        /// `REMOTE_*`.
        flags: u32,
        reserved: u32,
        remote_pages: u64,
    }
    Create: 16 {
        size: u32,
        flags: u32,
        id: u64,
    }
    /// One mapping of a template.
    Map: 40 {
        start: u64,
        length: u64,
        prot: u32,
        flags: u32,
        /// A regular file, or -1.
        fd: i32,
        reserved: u32,
        offset: u64,
    }
    /// A run of pool pages in a mapping of a template.
    Extent: 32 {
        address: u64,
        pages: u64,
        /// The page of the source that is the first.
        device_page: u64,
        /// `SOURCE_*`.
        source: u32,
        reserved: u32,
    }
    Add: 40 {
        size: u32,
        flags: u32,
        maps: u64,
        nr_maps: u32,
        map_size: u32,
        extents: u64,
        nr_extents: u32,
        extent_size: u32,
    }
    /// The structure of [`SEAL`] and of [`DELETE`].
    Flags: 8 {
        size: u32,
        flags: u32,
    }
    Attach: 24 {
        size: u32,
        /// `ATTACH_*`.
        flags: u32,
        failed_at: u64,
        pidfd: i32,
        reserved: u32,
    }
    Promote: 32 {
        size: u32,
        /// `PROMOTE_*`.
        flags: u32,
        start: u64,
        length: u64,
        pages: u64,
    }
    /// A template's figures.
    Stat: 72 {
        size: u32,
        /// `STATE_*`.
        state: u32,
        id: u64,
        maps: u64,
        extents: u64,
        pool_pages: u64,
        /// How often it was attached.
        attached: u64,
        /// How many areas map it now.
        mapped: u64,
        /// The process that made it, or 0 if this pid namespace does not know it.
        owner: i32,
        reserved: u32,
        /// Pages that are in this machine's memory.
        local_pages: u64,
    }
    List: 24 {
        size: u32,
        entry_size: u32,
        entries: u64,
        capacity: u32,
        count: u32,
    }
    Query: 40 {
        size: u32,
        flags: u32,
        maps: u64,
        nr_maps: u32,
        map_size: u32,
        extents: u64,
        nr_extents: u32,
        extent_size: u32,
    }
    /// Of `/dev/pseudo_mm_rdma`.
    RdmaConnect: 64 {
        size: u32,
        timeout_ms: u32,
        server: u64,
        server_size: u32,
        hello_size: u32,
        hello: u64,
        pages: u64,
        generation: u64,
        uuid: [u8; 16],
    }
    /// What a server says of its pool, all fields little-endian.
    RdmaPool: 56 {
        magic: u32,
        version: u32,
        address: u64,
        pages: u64,
        generation: u64,
        uuid: [u8; 16],
        rkey: u32,
        page_size: u32,
    }
}

macro_rules! sized {
    ($($name:ident { $($field:ident: $value:expr),* })*) => {$(
        impl SizeFirst for $name {}

        impl $name {
            /// Zeroes, but for the sizes.
            #[must_use]
            pub fn new() -> Self {
                Self { size: size_of::<Self>(), $($field: $value,)* ..Self::default() }
            }
        }
    )*};
}

sized! {
    Info {}
    Register {}
    RegisterRemote {}
    Create {}
    Add { map_size: size_of::<Map>(), extent_size: size_of::<Extent>() }
    Flags {}
    Attach {}
    Promote {}
    Stat {}
    List { entry_size: size_of::<Stat>() }
    Query { map_size: size_of::<Map>(), extent_size: size_of::<Extent>() }
    RdmaConnect {}
}

impl Map {
    /// Private anonymous memory, zero where no extent says otherwise.
    #[must_use]
    pub fn private_anonymous(start: u64, length: u64, prot: libc::c_int) -> Self {
        Self {
            start,
            length,
            prot: prot.cast_unsigned(),
            flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).cast_unsigned(),
            fd: -1,
            ..Self::default()
        }
    }
}

impl Extent {
    /// Pages of the device.
    #[must_use]
    pub fn of_device(address: u64, pages: u64, device_page: u64) -> Self {
        Self {
            address,
            pages,
            device_page,
            ..Self::default()
        }
    }

    /// Pages of the remote pool.
    #[must_use]
    pub fn of_remote(address: u64, pages: u64, remote_page: u64) -> Self {
        Self {
            source: SOURCE_REMOTE,
            ..Self::of_device(address, pages, remote_page)
        }
    }
}

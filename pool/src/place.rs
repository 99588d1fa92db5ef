//! Making and finding what holds a pool's pages: `pool.data`, memory, or a device.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::PAGE_SIZE;
use crate::backend::{Backend, Data, memory_path};
use crate::catalogue::Catalogue;
use crate::dax::DaxMemory;
use crate::dax::device::DaxError;
use crate::error::PoolError;
use crate::lease::{Lease, LeaseFiles, Mode};
use crate::pool::{LEAST_SIZE, PATIENCE};
use crate::superblock::Superblock;

/// Writes `pool.data` under another name first, so that it is there whole or not at all.
pub fn write_superblock(
    directory: &Path,
    path: &Path,
    superblock: &Superblock,
) -> Result<(), PoolError> {
    let unfinished = directory.join("pool.data.new");
    remove_if_there(&unfinished)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)
        .map_err(|e| PoolError::io("make", &unfinished, e))?;
    let length = match superblock.backend {
        Backend::File => superblock.size,
        Backend::Memfd | Backend::Dax => PAGE_SIZE as u64,
    };
    file.set_len(length)
        .map_err(|e| PoolError::io("size", &unfinished, e))?;
    file.write_all_at(&superblock.encode(), 0)
        .and_then(|()| file.sync_all())
        .map_err(|e| PoolError::io("write", &unfinished, e))?;
    std::fs::rename(&unfinished, path).map_err(|e| PoolError::io("put in place", path, e))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|e| PoolError::io("flush the directory", directory, e))
}

pub fn open_memory(
    superblock: &Superblock,
    catalogue: &Catalogue,
    leases: &LeaseFiles,
) -> Result<Data, PoolError> {
    if let Some(data) = Data::in_memory(superblock)? {
        return Ok(data);
    }
    let _writer = Lease::take(&leases.writer(), Mode::Exclusive, PATIENCE)?;
    if let Some(data) = Data::in_memory(superblock)? {
        return Ok(data);
    }
    // Forget first: a crash in between must not leave records of pages that are all zeros.
    let forgotten = catalogue.change(|change| change.clear(), |_| ())?;
    Data::make_memory(superblock)?;
    tracing::warn!(
        "The pool's pages were in memory and are gone, after a reboot or by hand; \
         {forgotten} template(s) were forgotten and have to be made again"
    );
    Data::in_memory(superblock)?.ok_or_else(|| {
        let path = memory_path(superblock.uuid);
        PoolError::io("open", &path, std::io::ErrorKind::NotFound)
    })
}

/// A device for a new pool, to nobody else's use while it is open here. What it holds may be lost with
/// `overwrite`, and otherwise unless it is a pool.
pub fn unoccupied(device: &Path, overwrite: bool) -> Result<DaxMemory, PoolError> {
    let memory = DaxMemory::open(device, LEAST_SIZE, Mode::Exclusive)?;
    let mut block = [0; PAGE_SIZE];
    memory.read_at(&mut block, 0)?;
    let occupied = match Superblock::decode(&block, device) {
        Ok(superblock) => Some(superblock.uuid.to_string()),
        Err(PoolError::BadMagic { .. }) => None,
        Err(_) => Some("of another version, or damaged".to_owned()),
    };
    if let Some(uuid) = occupied.filter(|_| !overwrite) {
        let path = device.to_path_buf();
        return Err(DaxError::Occupied { path, uuid }.into());
    }
    Ok(memory)
}

/// Makes the device that of the pool in a directory.
pub fn take_device(
    pool: &Path,
    device: &Path,
    memory: &DaxMemory,
    superblock: &Superblock,
) -> Result<(), PoolError> {
    let target =
        std::path::absolute(device).map_err(|e| PoolError::io("find the place of", device, e))?;
    let link = device_link(pool);
    remove_if_there(&link)?;
    std::os::unix::fs::symlink(&target, &link)
        .map_err(|e| PoolError::io("make the link", &link, e))?;
    memory.write_at(&superblock.encode(), 0)
}

/// The link by which a pool knows its device.
pub fn device_link(pool: &Path) -> PathBuf {
    pool.join("device")
}

pub fn open_device(path: &Path, superblock: &Superblock) -> Result<Data, PoolError> {
    let link = device_link(path);
    let device = std::fs::read_link(&link).map_err(|e| PoolError::io("read the link", &link, e))?;
    let memory = DaxMemory::open(&device, superblock.size, Mode::Shared)?;
    let mut block = [0; PAGE_SIZE];
    memory.read_at(&mut block, 0)?;
    let found = Superblock::decode(&block, &device);
    if found.is_ok_and(|found| found.uuid == superblock.uuid) {
        return Ok(Data::on_device(memory, &device));
    }
    Err(DaxError::OtherPages {
        path: device,
        pool: path.to_path_buf(),
    }
    .into())
}

pub fn remove_if_there(path: &Path) -> Result<(), PoolError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(PoolError::io("remove", path, e)),
        _ => Ok(()),
    }
}

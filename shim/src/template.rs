//! Templates on this host: their zygotes, the seats kept ready for them, and dumps.
//!
//! A template's zygote is built by `Prepare` or at its first start, and stands until the template
//! is deleted or replaced, or memory is short ([`eviction`]). Seats (a tenancy cgroup, with an agent
//! and a clone of the zygote in it) are made off the call's path and used again after a tenancy, since
//! moving a task between cgroups of version 1 takes long. Only as many seats as shall be ready have a
//! clone, since a clone holds a copy of what calls write.

mod criu;
mod eviction;
mod pressure;
mod recorded;
mod roots;
mod standing;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use trenv_config::Config;
use trenv_pool::{Pool, PoolError, PoolOptions, TemplateId, TemplateReader};
use trenv_sandbox::Sandbox;
use trenv_sandbox::cgroup::{Limits, TenancyCgroup};
use trenv_sandbox::rootfs::{Keeper, Mount, copy_upper, overlay_from_mounts};
use trenv_snapshot::Fingerprint;
use trenv_snapshot::dump::{self, DumpError, DumpRequest, Dumped};
use trenv_snapshot::methods::Prepared;
use trenv_snapshot::zygote::{Zygote, ZygoteError, ZygoteRequest};

use crate::error::{Result, ShimError, pool_error};
use crate::reap::Unswept;
use crate::sandbox::{Seat, TemplateRef, Tenancy};
use criu::criu_error;
pub use eviction::{Claim, guard_memory};
use eviction::{Reason, bytes_of};
pub use roots::layers_only;
use standing::Standing;
pub use standing::TenancyRoot;

/// Seats kept after tenancies have given them back.
const SEATS_MAX: usize = 32;

/// What a function's template was made from.
#[derive(Debug, Clone)]
pub struct Base {
    pub template: TemplateRef,
    /// A view of its layers.
    pub rootfs: Vec<Mount>,
}

impl Base {
    /// Whether it is this template.
    fn is(&self, template: &TemplateRef) -> bool {
        let newest = self.template.generation == 0;
        self.template.id == template.id
            && self.template.method == template.method
            && (newest || self.template.generation == template.generation)
    }
}

/// The templates that this shim uses. All methods may block.
pub struct Templates {
    config: Arc<Config>,
    /// Parent of the cgroups of this namespace.
    cgroup_parent: String,
    pool: Mutex<Option<Pool>>,
    standing: Mutex<HashMap<TemplateRef, Arc<Standing>>>,
    /// Held while a zygote is built, so that none is built twice.
    building: Mutex<()>,
    /// Held while templates are evicted.
    evicting: Mutex<()>,
    next_seat: AtomicU64,
    /// Holds the roots that more than one tenancy may have; made with the first of them.
    keeper: Mutex<Option<Keeper>>,
}

impl Templates {
    pub fn new(config: Arc<Config>, cgroup_parent: String) -> Self {
        let templates = Self {
            config,
            cgroup_parent,
            pool: Mutex::default(),
            standing: Mutex::default(),
            building: Mutex::default(),
            evicting: Mutex::default(),
            next_seat: AtomicU64::new(0),
            keeper: Mutex::default(),
        };
        if let Err(err) = templates.criu_images().sweep() {
            tracing::warn!("What an earlier CRIU has left stays: {err}");
        }
        templates
    }

    /// What a template's key must contain so that it is only used where it fits.
    pub fn fingerprint() -> Result<String> {
        Fingerprint::of_this_machine()
            .map(|fingerprint| fingerprint.to_string())
            .map_err(ShimError::engine("describe this machine"))
    }

    /// The newest generation in place of 0.
    pub fn resolve(&self, template: TemplateRef) -> Result<TemplateRef> {
        if template.generation != 0 {
            return Ok(template);
        }
        let generation = self.reader(template)?.info().generation;
        Ok(TemplateRef {
            generation,
            ..template
        })
    }

    /// Makes sure that a template's zygote stands and its seats are there.
    pub fn prepare(
        &self,
        template: TemplateRef,
        rootfs: &[Mount],
        limits: &Limits,
        seats: usize,
        base: Option<Base>,
    ) -> Result<u64> {
        let seats = if seats == 0 {
            self.config.sandbox.spare_agents
        } else {
            seats
        };
        let standing = self.stand(template, rootfs, limits, seats, base)?;
        *lock(&standing.limits) = limits.clone();
        standing.wanted.fetch_max(seats, Ordering::Relaxed);
        let standing = self.fill_or_rebuild(template, standing)?;
        self.forget_older(template);
        standing
            .method
            .resident_bytes()
            .map_err(ShimError::engine("look at the zygote"))
    }

    /// How long the clones took that were made since this was asked last.
    pub fn clone_times(&self, template: &TemplateRef) -> Vec<Duration> {
        let standing = lock(&self.standing).get(template).cloned();
        standing.map_or_else(Vec::new, |standing| {
            lock(&standing.clone_times).drain(..).collect()
        })
    }

    /// A seat whose agent can clone the template, ready or made now; `true` when a clone waits in it.
    /// The template is not evicted before the claim is dropped.
    pub fn seat(
        &self,
        template: TemplateRef,
        active: &[Mount],
        limits: &Limits,
    ) -> Result<(Arc<Seat>, bool, Claim)> {
        let rootfs = layers_only(active);
        let spare = self.config.sandbox.spare_agents;
        let mut standing = self.stand(template, &rootfs, limits, spare, None)?;
        *lock(&standing.last_used) = Instant::now();
        let (seat, was_ready) = match standing.take_living() {
            Some(found) => found,
            None => match self.make_seat(template, &standing, limits) {
                Ok(seat) => {
                    tracing::info!("A seat of {} was made on the call's path", template.id);
                    (seat, false)
                }
                Err(ShimError::Engine { source, .. }) if is_gone(source.as_ref()) => {
                    // Somebody killed the zygote: build it anew, once.
                    self.forget(template);
                    let wanted = standing.wanted.load(Ordering::Relaxed);
                    let base = standing.base.clone();
                    standing = self.stand(template, &rootfs, limits, wanted, base)?;
                    (self.make_seat(template, &standing, limits)?, false)
                }
                Err(err) => return Err(err),
            },
        };
        seat.limit(limits)?;
        Ok((seat, was_ready, Claim::of(standing)))
    }

    /// Takes an empty seat back after a tenancy.
    pub fn give_back(&self, seat: Arc<Seat>) -> Result<()> {
        seat.new_oom_kills();
        let standing = seat
            .template
            .and_then(|template| lock(&self.standing).get(&template).cloned());
        if let (Some(template), Some(standing)) = (seat.template, &standing) {
            self.keep_recorded(template, standing);
        }
        if let Some(standing) = standing
            && standing.made_seat(&seat)
            && lock(&standing.seats).len() < SEATS_MAX.max(standing.wanted.load(Ordering::Relaxed))
            && seat
                .cgroup
                .reset_counters()
                .map_err(ShimError::engine("reset the counters"))?
        {
            let template = seat.template;
            lock(&standing.seats).push(seat);
            // What the tenancy taught may have ended the clones made before.
            return template.map_or(Ok(()), |template| self.refill(template));
        }
        seat.remove()
    }

    /// Makes seats until as many are ready as shall be.
    pub fn refill(&self, template: TemplateRef) -> Result<()> {
        let standing = lock(&self.standing).get(&template).cloned();
        match standing {
            Some(standing) => self.fill_or_rebuild(template, standing).map(drop),
            None => Ok(()),
        }
    }

    /// Writes a tenancy's template to the pool, beside CRIU's image if that is asked for, and ends its
    /// processes. They go on after an error, and where `copy` is a root to copy theirs to.
    pub fn dump(
        &self,
        key: &str,
        sandbox: &Sandbox,
        tenancy: &Tenancy,
        copy: &[Mount],
        criu: bool,
    ) -> Result<Dumped> {
        let image = criu
            .then(|| self.criu_image(sandbox, tenancy))
            .transpose()?;
        let mut writer = self
            .pool()?
            .begin(key)
            .map_err(pool_error("begin a template"))?;
        if let Some(origin) = tenancy.seat.template {
            let shared = self.reader(origin).and_then(|origin| {
                writer
                    .share_with(origin)
                    .map_err(pool_error("share pages with a template"))
            });
            if let Err(err) = shared {
                tracing::warn!(
                    "A snapshot is stored whole, not beside {}, which it was started from: {}",
                    origin.id,
                    err.chain()
                );
            }
        }
        let request = DumpRequest {
            group: tenancy.seat.as_ref(),
            init_pid: sandbox.init_pid(),
            root_pid: tenancy.root.pid.cast_signed(),
            stdio: tenancy.stdio,
        };
        let dumped = if copy.is_empty() {
            dump::dump(&request, writer)
        } else {
            let copy = || copy_upper(&tenancy.mounts, copy).map_err(io::Error::other);
            dump::dump_and_go_on(&request, writer, &copy)
        };
        let dumped = dumped.map_err(dump_error)?;
        if let Some(image) = image {
            let template = &dumped.template;
            // The first start by it tells that it is not there.
            if let Err(err) = image.keep(&template.id, template.generation) {
                tracing::warn!("{} has no image of CRIU's: {err}", template.id);
            }
        }
        Ok(dumped)
    }

    /// Deletes a template of any generation; one that does not exist is fine.
    pub fn delete(&self, id: TemplateId) -> Result<()> {
        self.forget_where(|template| template.id == id);
        self.forget_recorded(&id, None);
        self.forget_criu_images(&id, None);
        match self.pool()?.delete(&id) {
            Ok(_) | Err(PoolError::NoSuchTemplate { .. }) => Ok(()),
            Err(err) => Err(pool_error("delete a template")(err)),
        }
    }

    /// Ends all zygotes and seats.
    pub fn free(&self) {
        self.forget_where(|_| true);
    }

    pub fn reader(&self, template: TemplateRef) -> Result<TemplateReader> {
        let generation = (template.generation != 0).then_some(template.generation);
        self.pool()?
            .template(&template.id, generation)
            .map_err(pool_error("open the template"))
    }

    /// The program that becomes a zygote.
    fn zygote_binary(&self) -> PathBuf {
        self.config.libexec_dir.join("trenv-zygote")
    }

    /// A new tenancy cgroup.
    pub fn tenancy_cgroup(&self, limits: &Limits) -> Result<TenancyCgroup> {
        let number = self.next_seat.fetch_add(1, Ordering::Relaxed);
        let name = format!("tenancy-{}-{number}", std::process::id());
        TenancyCgroup::create(&self.cgroup_parent, &name, limits)
            .map_err(ShimError::engine("make a tenancy's cgroup"))
    }

    /// The pool; opened anew when there is another in its place.
    fn pool(&self) -> Result<Pool> {
        let mut kept = lock(&self.pool);
        if let Some(pool) = kept.as_ref().filter(|pool| !pool.is_replaced()) {
            return Ok(pool.clone());
        }
        let backend = self.config.pool.backend.parse().map_err(|err| {
            ShimError::InvalidArgument(format!("The configured pool cannot be used: {err}"))
        })?;
        let options = PoolOptions {
            backend,
            path: self.config.pool_path(),
            size: self.config.pool.size,
            device: self.config.pool.device.clone(),
        };
        let pool = options
            .open_or_format()
            .map_err(pool_error("open the pool"))?;
        Ok(kept.insert(pool).clone())
    }

    fn stand(
        &self,
        template: TemplateRef,
        rootfs: &[Mount],
        limits: &Limits,
        wanted: usize,
        base: Option<Base>,
    ) -> Result<Arc<Standing>> {
        let known = || lock(&self.standing).get(&template).cloned();
        if let Some(standing) = known() {
            return Ok(standing);
        }
        let below = base.as_ref().and_then(|base| self.stand_base(base));
        let _building = lock(&self.building);
        if let Some(standing) = known() {
            return Ok(standing);
        }
        let mut below = below;
        let mut made = self.build(template, rootfs, limits, wanted, below.as_deref());
        if let Err(ShimError::Engine { source, .. }) = &made
            && below.is_some()
            && is_gone(source.as_ref())
        {
            // What fails with a base that somebody killed does not fail by itself.
            base.iter().for_each(|base| self.forget(base.template));
            below = None;
            made = self.build(template, rootfs, limits, wanted, None);
        }
        if let Err(ShimError::Engine { source, .. }) = &made
            && was_killed(source.as_ref())
            && self.evict(&Reason::Unbuilt, false)
        {
            made = self.build(template, rootfs, limits, wanted, below.as_deref());
        }
        let made = made?;
        let built = Arc::new(Standing { base, ..made });
        lock(&self.standing).insert(template, Arc::clone(&built));
        Ok(built)
    }

    /// The base of a function, its zygote made where none stands. Without it the function has its
    /// pages for itself.
    fn stand_base(&self, base: &Base) -> Option<Arc<Standing>> {
        let below = self
            .resolve(base.template)
            .and_then(|template| self.stand(template, &base.rootfs, &Limits::default(), 0, None));
        match below {
            Ok(below) => Some(below),
            Err(err) => {
                let id = base.template.id;
                tracing::warn!("No memory is shared with the base {id}: {}", err.chain());
                None
            }
        }
    }

    fn build(
        &self,
        template: TemplateRef,
        rootfs: &[Mount],
        limits: &Limits,
        wanted: usize,
        below: Option<&Standing>,
    ) -> Result<Standing> {
        let reader = self.reader(template)?;
        self.make_room(bytes_of(&reader, template.method), false);
        let root =
            overlay_from_mounts(rootfs).map_err(ShimError::engine("mount the zygote's layers"))?;
        let number = self.next_seat.fetch_add(1, Ordering::Relaxed);
        let short: String = template.id.to_string().chars().take(16).collect();
        let name = format!("{short}-{}-{number}", template.generation);
        let parent = format!("{}/zygotes", self.cgroup_parent);
        let cgroup = TenancyCgroup::create(&parent, &name, &Limits::default())
            .map_err(ShimError::engine("make the zygote's cgroup"))?;
        // Compressed swap loses shared pages that one process frees; docs/start-methods.md.
        cgroup
            .keep_from_swap()
            .map_err(ShimError::engine("keep the zygote's memory out of swap"))?;
        let request = ZygoteRequest {
            template: &reader,
            rootfs: root,
            binary: &self.zygote_binary(),
            cgroups: cgroup
                .dirs()
                .iter()
                .map(|dir| dir.join("cgroup.procs"))
                .collect(),
            base: below.and_then(|below| below.method.zygote()),
        };
        let begun = Instant::now();
        match template.method.prepare(request, &self.config.state_dir) {
            Ok(method) => {
                let name = template.method;
                tracing::info!(
                    "Built the zygote of {short}, {name}, in {:?}",
                    begun.elapsed()
                );
                let helper = method.helper().map(u32::cast_signed);
                let zygote = method.zygote().map(Zygote::pid);
                let children = zygote.into_iter().chain(helper);
                let recorded = self.recall(template, &method);
                Ok(Standing {
                    recorded: Mutex::new(recorded),
                    _unswept: children.map(Unswept::new).collect(),
                    method,
                    zygote_cgroup: cgroup,
                    limits: Mutex::new(limits.clone()),
                    seats: Mutex::default(),
                    made: Mutex::default(),
                    clone_times: Mutex::default(),
                    last_used: Mutex::new(Instant::now()),
                    filling: Mutex::default(),
                    staged: Mutex::default(),
                    wanted: AtomicUsize::new(wanted),
                    rootfs: rootfs.to_vec(),
                    base: None,
                    _reader: reader,
                })
            }
            Err(err) => {
                // The first error is the one to report.
                let _ = cgroup.kill_all().and_then(|()| cgroup.remove());
                Err(zygote_error("build the template's zygote")(err))
            }
        }
    }

    /// Makes the missing seats; a zygote that somebody killed is built anew, once.
    fn fill_or_rebuild(
        &self,
        template: TemplateRef,
        standing: Arc<Standing>,
    ) -> Result<Arc<Standing>> {
        match self.fill(template, &standing) {
            Ok(()) => Ok(standing),
            // One that was forgotten meanwhile, with its template, must not come back.
            Err(ShimError::Engine { source, .. })
                if is_gone(source.as_ref()) && self.is_standing(template, &standing) =>
            {
                self.forget(template);
                let limits = lock(&standing.limits).clone();
                let wanted = standing.wanted.load(Ordering::Relaxed);
                let base = standing.base.clone();
                let standing = self.stand(template, &standing.rootfs, &limits, wanted, base)?;
                self.fill(template, &standing)?;
                Ok(standing)
            }
            Err(err) => Err(err),
        }
    }

    fn fill(&self, template: TemplateRef, standing: &Standing) -> Result<()> {
        // One at a time, so that there are not more clones than are wanted.
        let _filling = lock(&standing.filling);
        if let Prepared::Criu(criu) = &standing.method {
            criu.ready().map_err(criu_error)?;
        }
        while standing.prepared() < standing.wanted.load(Ordering::Relaxed) {
            // Out of the others' reach while its clone is made.
            let seat = match standing.take_unprepared() {
                Some(seat) => seat,
                None => {
                    let limits = lock(&standing.limits).clone();
                    self.make_seat(template, standing, &limits)?
                }
            };
            let begun = Instant::now();
            match seat.prepare() {
                Ok(()) => {
                    standing.note_clone(begun.elapsed());
                    lock(&standing.seats).push(seat);
                }
                Err(err) => {
                    // The first error is the one to report.
                    let _ = seat.remove();
                    return Err(err);
                }
            }
        }
        Ok(())
    }

    fn make_seat(
        &self,
        template: TemplateRef,
        standing: &Standing,
        limits: &Limits,
    ) -> Result<Arc<Seat>> {
        let agent = standing
            .method
            .zygote()
            .map(Zygote::agent)
            .transpose()
            .map_err(zygote_error("make an agent of the zygote"))?;
        let cgroup = self.tenancy_cgroup(limits)?;
        if cgroup.dir_fd().is_none()
            && let Some(Err(err)) = agent.as_ref().map(|agent| cgroup.add(agent.pid()))
        {
            drop(agent);
            // The first error is the one to report.
            let _ = cgroup.kill_all().and_then(|()| cgroup.remove());
            return Err(ShimError::engine("move an agent into its cgroup")(err));
        }
        let method = standing.method.clone();
        let seat = Seat::of_template(cgroup, template, method, limits.clone(), agent);
        seat.groups()?;
        let seat = Arc::new(seat);
        standing.note(&seat);
        Ok(seat)
    }

    /// The template, prepared for whatever start method: a root serves all.
    fn standing_by_any(&self, template: TemplateRef) -> impl Iterator<Item = Arc<Standing>> {
        let all = lock(&self.standing);
        let found: Vec<Arc<Standing>> = all
            .iter()
            .filter(|(known, _)| (known.id, known.generation) == (template.id, template.generation))
            .map(|(_, standing)| Arc::clone(standing))
            .collect();
        found.into_iter()
    }

    fn is_standing(&self, template: TemplateRef, standing: &Arc<Standing>) -> bool {
        let all = lock(&self.standing);
        all.get(&template)
            .is_some_and(|known| Arc::ptr_eq(known, standing))
    }

    fn forget(&self, template: TemplateRef) {
        self.forget_where(|known| *known == template);
    }

    fn forget_older(&self, template: TemplateRef) {
        self.forget_recorded(&template.id, Some(template.generation));
        self.forget_criu_images(&template.id, Some(template.generation));
        self.forget_where(|known| {
            known.id == template.id && known.generation < template.generation
        });
    }

    fn forget_where(&self, which: impl Fn(&TemplateRef) -> bool) {
        let gone: Vec<Arc<Standing>> = lock(&self.standing)
            .extract_if(|known, _| which(known))
            .map(|(_, gone)| gone)
            .collect();
        for standing in gone {
            standing.end();
        }
    }
}

/// Locks; a panic elsewhere leaves what is locked as usable as it was.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_gone(source: &(dyn std::error::Error + 'static)) -> bool {
    matches!(
        source.downcast_ref(),
        Some(ZygoteError::Gone | ZygoteError::Io { .. })
    )
}

/// Whether a zygote ended while it was built: only the kernel, for want of memory, or somebody's
/// signal ends one.
fn was_killed(source: &(dyn std::error::Error + 'static)) -> bool {
    matches!(source.downcast_ref(), Some(ZygoteError::Gone))
}

fn zygote_error(action: &'static str) -> impl FnOnce(ZygoteError) -> ShimError {
    move |err| match err {
        ZygoteError::Pool(err) => pool_error(action)(err),
        ZygoteError::Criu(err) => criu_error(err),
        // A template that is made anew has the clocks of this boot, and this program's description.
        ZygoteError::Clock(_) | ZygoteError::Manifest(_) => ShimError::Lost {
            action,
            source: Box::new(err),
        },
        ZygoteError::NoDevice => ShimError::Unimplemented(err.to_string()),
        ZygoteError::OtherFile { .. } => ShimError::InvalidArgument(err.to_string()),
        ZygoteError::Fingerprint { .. } => ShimError::WrongState {
            action: "use",
            id: "the template".into(),
            state: err.to_string(),
        },
        ZygoteError::Deadline(limit) => ShimError::Timeout {
            what: "The restore".into(),
            limit,
        },
        err => ShimError::engine(action)(err),
    }
}

/// A failed start, in the caller's terms.
pub fn start_error(err: ZygoteError) -> ShimError {
    zygote_error("restore the function")(err)
}

fn dump_error(err: DumpError) -> ShimError {
    match err {
        DumpError::Refused(_) => ShimError::Unimplemented(err.to_string()),
        DumpError::Stuck { .. } => ShimError::Timeout {
            what: err.to_string(),
            limit: Duration::from_secs(5),
        },
        DumpError::Pool(err) => pool_error("store the snapshot")(err),
        err => ShimError::engine("dump the function")(err),
    }
}

#[cfg(test)]
mod tests {
    use trenv_snapshot::clock::ClockError;
    use trenv_snapshot::manifest::ManifestError;

    use super::*;

    #[test]
    fn a_template_of_an_earlier_boot_or_version_is_made_anew() {
        let ahead = ClockError::Ahead {
            clock: "CLOCK_MONOTONIC",
            ahead: Duration::from_secs(3600),
        };
        let no_namespace = ClockError::NoNamespace {
            source: std::io::Error::from_raw_os_error(28),
        };
        for (err, advice) in [
            (ahead.into(), "snapshot the function anew"),
            (no_namespace.into(), "snapshot the function anew"),
            (
                ManifestError::Version { found: 1 }.into(),
                "take the snapshot again",
            ),
        ] {
            let ttrpc::Error::RpcStatus(status) = start_error(err).into() else {
                panic!("a status is expected");
            };
            // Of what is lost the provider makes another (`PrepareError::template_gone`).
            assert_eq!(status.code(), ttrpc::Code::DATA_LOSS);
            let message = status.message();
            assert!(message.contains(advice), "{message}");
        }
    }
}

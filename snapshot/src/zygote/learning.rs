//! What a zygote learns from the instances made of it.

use super::{Zygote, ZygoteError, io_error, lock};
use crate::recording::Recorded;

impl Zygote {
    /// Learns from an instance which pages its calls touch: those that they write are copied ahead
    /// by later clones, in a few large steps instead of a fault each, and those of files that they
    /// read are there in later clones from the start. Call it at a tenancy's end, before the tree is
    /// killed, with the pids of its start and the input that it served, for tenancies that had calls;
    /// tells whether clones made before lack something.
    ///
    /// # Errors
    /// When /proc cannot be read, as when the instance has ended. Nothing changes then.
    pub fn learn(&self, pids: &[i32], input: &str) -> Result<bool, ZygoteError> {
        lock(&self.working_set)
            .learn(self.pid, pids, input)
            .map_err(io_error("reading page maps"))
    }

    /// What [`Zygote::learn`] has recorded.
    #[must_use]
    pub fn recorded(&self) -> Vec<Recorded> {
        lock(&self.working_set).recorded()
    }

    /// Begins with what an earlier zygote of the template has recorded.
    ///
    /// # Errors
    /// When the zygote has ended.
    pub fn recall(&self, recorded: &[Recorded]) -> Result<(), ZygoteError> {
        lock(&self.working_set)
            .recall(self.pid, recorded)
            .map_err(io_error("telling the zygote what is written"))
    }

    /// [`Zygote::learn`] for pages of files alone.
    pub(crate) fn learn_files(&self, pids: &[i32]) -> Result<bool, ZygoteError> {
        lock(&self.working_set)
            .learn_files(self.pid, pids)
            .map_err(io_error("reading page maps"))
    }
}

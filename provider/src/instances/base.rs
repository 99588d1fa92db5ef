//! The first start of a function from its base: the base's instance in the function's layers, which
//! then loads what the base has not.

use std::net::SocketAddr;
use std::sync::Arc;

use super::host::failed;
use super::ready::load;
use super::{ColdStart, Host, SandboxOps, SandboxRef, StartError, wait_ready};
use crate::functions::{Base, Revision, Source, StartMethod};

impl Host {
    /// Makes a sandbox that runs the function in an instance of its base, and waits until it is
    /// loaded and ready.
    ///
    /// # Errors
    /// When the base cannot be started there, or cannot load the function.
    pub async fn start_from_base(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        base: &Base,
    ) -> Result<ColdStart, StartError> {
        let address = self.create_idle(sandbox).await?;
        let source = Source::of(&base.revision, &base.template, StartMethod::Template);
        let (start, steps) = self.restore(sandbox, revision, &source, Some("")).await?;
        let tenancy = start.tenancy.clone();
        self.record_serving(sandbox, revision, start);
        if let Err(reason) = self.load_handler(revision, base, address).await {
            let said = self.logs().last_words(sandbox);
            self.destroy(sandbox, Some(&tenancy)).await;
            let reason = match said {
                Some(said) => format!("{reason}; it last said: {said}"),
                None => reason,
            };
            return Err(failed(&revision.function().to_string(), reason));
        }
        Ok(ColdStart {
            address,
            tenancy,
            steps,
        })
    }

    async fn load_handler(
        &self,
        revision: &Revision,
        base: &Base,
        address: SocketAddr,
    ) -> Result<(), String> {
        let variables = base.variables_of(revision);
        load(address, &variables, self.ready_timeout()).await?;
        let path = revision.record.ready_path.as_deref();
        if path.is_some() {
            wait_ready(address, path, self.ready_timeout()).await?;
        }
        Ok(())
    }
}

//! Makes the declarations of libdaxctl from its header, for the program only.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "libdaxctl")]
    libdaxctl::declare();
}

#[cfg(feature = "libdaxctl")]
mod libdaxctl {
    use std::path::Path;

    /// What the program calls.
    const FUNCTIONS: &str = "daxctl_(new|unref|region_get_(first|next|path)|dev_is_enabled|\
        dev_get_(first|next|devname|size|align|major|minor|target_node|memory))";

    pub fn declare() {
        let made = bindgen::Builder::default()
            .header_contents("libdaxctl.h", "#include <daxctl/libdaxctl.h>")
            .allowlist_function(FUNCTIONS)
            .generate();
        let written = made.map_err(|e| e.to_string()).and_then(|declarations| {
            let folder = std::env::var_os("OUT_DIR").ok_or("there is no OUT_DIR")?;
            let file = Path::new(&folder).join("libdaxctl.rs");
            declarations.write_to_file(file).map_err(|e| e.to_string())
        });
        if let Err(e) = written {
            println!(
                "cargo:error=Failed to declare the functions of libdaxctl: {e}; install libdaxctl-dev and libclang-dev"
            );
        }
        println!("cargo:rustc-link-lib=dylib=daxctl");
    }
}

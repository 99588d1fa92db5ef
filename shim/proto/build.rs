//! Generates the messages and the ttrpc service from `trenv.sandbox.v1.proto`.

fn main() {
    println!("cargo:rerun-if-changed=trenv.sandbox.v1.proto");
    let out = std::env::var("OUT_DIR").unwrap_or_default();
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let done = ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input(format!("{here}/trenv.sandbox.v1.proto"))
        .include(&here)
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            gen_mod: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(true))
        .run();
    if let Err(err) = done {
        eprintln!("Failed to generate code from trenv.sandbox.v1.proto: {err}");
        std::process::exit(1);
    }
}

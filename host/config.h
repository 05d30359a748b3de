// config.h: the hyper-parameters of a model file.
#pragma once

#include <map>

#include "model.h"

// The Config in a file's __metadata__, which docs/model-file.md describes; after it, metadata is known to hold "types"
// and "tokenizer_sha256" too. Throws Error with one line that names the key, its value and what it must be, a key that
// is not known included.
Config read_config(const std::string& path, const std::map<std::string, std::string>& metadata);

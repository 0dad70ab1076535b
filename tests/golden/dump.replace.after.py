class GraphModule(torch.nn.Module):
    def forward(self, L_self_modules_up_parameters_weight_: "f32[96, 48]", L_self_modules_up_parameters_bias_: "f32[96]", L_x_: "f32[3, 48]", L_self_modules_down_parameters_weight_: "f32[48, 96]", L_self_modules_lm_head_parameters_weight_: "f32[64, 48]", L_self_modules_lm_head_parameters_bias_: "f32[64]"):
        l_self_modules_up_parameters_weight_ = L_self_modules_up_parameters_weight_
        l_self_modules_up_parameters_bias_ = L_self_modules_up_parameters_bias_
        l_x_ = L_x_
        l_self_modules_down_parameters_weight_ = L_self_modules_down_parameters_weight_
        l_self_modules_lm_head_parameters_weight_ = L_self_modules_lm_head_parameters_weight_
        l_self_modules_lm_head_parameters_bias_ = L_self_modules_lm_head_parameters_bias_

        # File: tests/models/block.py:15 in forward, code: hidden = torch.relu(self.up(x))
        pifa_pivot_rows_0: "f32[16, 48]" = self.pifa_pivot_rows_0
        pifa_coefficients_1: "f32[80, 16]" = self.pifa_coefficients_1
        pifa_row_order_2: "i32[96]" = self.pifa_row_order_2
        linear_default: "f32[3, 96]" = torch.ops.pifa.linear.default(l_x_, pifa_pivot_rows_0, pifa_coefficients_1, pifa_row_order_2, l_self_modules_up_parameters_bias_, 1.0);  pifa_pivot_rows_0 = pifa_coefficients_1 = pifa_row_order_2 = l_self_modules_up_parameters_bias_ = None
        hidden: "f32[3, 96]" = torch.relu(linear_default);  linear_default = None

        # File: tests/models/block.py:16 in forward, code: out = x + self.down(hidden)
        pifa_pivot_rows_3: "f32[20, 96]" = self.pifa_pivot_rows_3
        pifa_coefficients_4: "f32[28, 20]" = self.pifa_coefficients_4
        pifa_row_order_5: "i32[48]" = self.pifa_row_order_5
        linear_default_1: "f32[3, 48]" = torch.ops.pifa.linear.default(hidden, pifa_pivot_rows_3, pifa_coefficients_4, pifa_row_order_5, None, 1.0);  hidden = pifa_pivot_rows_3 = pifa_coefficients_4 = pifa_row_order_5 = None
        out: "f32[3, 48]" = l_x_ + linear_default_1;  l_x_ = linear_default_1 = None

        # File: tests/models/block.py:17 in forward, code: return self.lm_head(out)
        linear_2: "f32[3, 64]" = torch._C._nn.linear(out, l_self_modules_lm_head_parameters_weight_, l_self_modules_lm_head_parameters_bias_);  out = l_self_modules_lm_head_parameters_weight_ = l_self_modules_lm_head_parameters_bias_ = None
        return (linear_2,)

